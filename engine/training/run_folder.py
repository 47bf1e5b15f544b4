"""The output folder of a run: what stands in it, who may write to it, where it goes on from."""

import fcntl
import json
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import torch

from ..config import Settings, result_settings
from ..errors import UserError
from . import checkpoint


class RunFolder:
    """Paths inside an output folder.

    Args:
        path: the output folder; need not exist.
    """

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.report = path / "report.html"
        self.settings = path / "settings.json"
        self.tokenizer = path / "tokenizer.safetensors"
        self.model = path / "model.safetensors"
        self.bad_pictures = path / "bad_pictures.txt"
        self.tensorboard = path / "tensorboard"
        self.lock = path / ".lock"
        self._lock_file: TextIO | None = None

    def refuse_if_used(self, settings: Settings, *, rehearsal: bool = False) -> None:
        """Raise `UserError` for a folder that holds anything, unless the run resumes or may overwrite.

        A rehearsal never takes the folder of a run.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output_dir = {self.path} is a file; give a folder.")
        if rehearsal and self.checkpoints.exists():
            raise UserError(f"output_dir = {self.path} holds a run; give another --output_dir.")
        if settings.resume == "auto" or settings.overwrite or not self.path.exists():
            return
        found = sorted(entry.name for entry in self.path.iterdir() if entry != self.lock)
        if found:
            raise UserError(
                f"output_dir = {self.path} is not empty (it holds {found[0]}{', ...' if len(found) > 1 else ''}); "
                f"add {'' if rehearsal else '--resume auto to go on, '}--overwrite to start anew, or give another "
                f"--output_dir."
            )

    def claim(self, *, clear: bool) -> None:
        """Create the folder, lock it against a second run until the `with` block ends, and clear it if asked.

        Raises:
            UserError: when it cannot be written, or another run holds it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock_file = self.lock.open("w")
        except OSError as error:
            raise UserError(
                f"output_dir = {self.path} cannot be written ({error.strerror}); give another folder."
            ) from None
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock_file.close()
            raise UserError(f"another run is writing to {self.path}; wait for it or give another folder.") from None
        except OSError as error:  # a network file system without locks
            print(f"warning: {self.path} cannot be locked ({error.strerror}); start only one run there")
        if clear:
            self.clear()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock_file is not None:
            self._lock_file.close()
            self._lock_file = None

    def clear(self) -> None:
        """Delete an earlier run's files but its tokenizer; files that are not a run's stay."""
        for folder in (self.checkpoints, self.tensorboard):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (self.metrics, self.report, self.settings, self.model, self.bad_pictures):
            file.unlink(missing_ok=True)

    def write_settings(self, settings: Settings, facts: dict[str, Any]) -> None:
        """Write the resolved settings and what the run ran on."""
        text = json.dumps({"settings": settings.model_dump(mode="json"), **facts}, indent=1)
        checkpoint.replace_durably(self.settings, lambda path: path.write_text(text))


def find_resume(settings: Settings) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The checkpoint to go on from, its manifest, and what is wrong with newer ones.

    Raises:
        UserError: when the checkpoint asked for is damaged, or no sound one is left, or its run was another.
    """
    problems: list[str] = []
    if settings.resume == "none":
        return None, {}, problems
    if settings.resume == "auto":
        folder, problems = checkpoint.newest_valid(RunFolder(settings.output_dir).checkpoints)
        if folder is None:
            return None, {}, problems
    else:
        folder = Path(settings.resume)
        if not folder.is_dir():
            raise UserError(
                f"resume = {folder} is not a checkpoint folder; give one such as "
                f"{settings.output_dir}/checkpoints/{checkpoint.tag_of(1000)}, auto or none."
            )
    manifest = checkpoint.read_manifest(folder)
    refuse_other_run(manifest, settings, folder)
    return folder, manifest, problems


def refuse_other_run(manifest: dict[str, Any], settings: Settings, folder: Path) -> None:
    """Raise `UserError` when a setting that changes the result is not the checkpoint's."""
    saved = manifest.get("settings", {})
    now = comparable(settings)
    different = [f"{key}: {saved.get(key)} then, {now[key]} now" for key in now if saved.get(key) != now[key]]
    if different:
        raise UserError(
            f"{folder} belongs to a run with other settings ({'; '.join(different)}); "
            f"give the same ones to go on, or another --output_dir to start a new run."
        )


def refuse_other_inputs(saved: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Raise `UserError` when the settings are the checkpoint's but what they lead to is not."""
    different = [f"{name}: {saved.get(name)} then, {now[name]} now" for name in now if saved.get(name) != now[name]]
    if different:
        raise UserError(
            f"{folder} was trained on something else ({'; '.join(different)}); bring it back to go on, "
            f"or start a new run in another --output_dir."
        )


def comparable(settings: Settings) -> dict[str, Any]:
    """The settings that change the result, as JSON keeps them."""
    values = result_settings(settings)
    return dict(json.loads(json.dumps(values, default=str)))


def run_facts(device: torch.device) -> dict[str, str]:
    """Hardware, versions and commit, for the run's record."""
    return {
        "device": device_name(device),
        "machine": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("fused-beit", "torch", "deepspeed", "triton", "numpy", "pillow")},
        "commit": git_commit(),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return model or platform.processor() or "CPU"


def version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def git_commit() -> str:
    """Commit of the source tree, with `-dirty` when it has changes; `unknown` outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
