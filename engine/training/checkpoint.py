"""Checkpoint folders that survive a kill at any moment and notice damage. Does not import deepspeed.

    checkpoints/latest                       name of the newest complete folder
    checkpoints/step-00001000/MANIFEST.json  size and CRC-32 of every file, and what the run was; written last
    checkpoints/step-00001000/...            DeepSpeed's shards, model.safetensors

A folder without a manifest is not a checkpoint. Every file is written under a temporary name, synced and renamed.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UserError

MANIFEST = "MANIFEST.json"
LATEST = "latest"
FORMAT = 1
ELSEWHERE = "restore it from a copy, or go on from another checkpoint (--resume auto takes the newest sound one)."


def tag_of(step: int) -> str:
    return f"step-{step:08d}"


def replace_durably(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, sync it to the disk and give it its name in one move."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    temporary.chmod(0o666 & ~_umask())  # some writers make files that others may not read
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Write the manifest of a complete folder and point `latest` to it."""
    files = {file.name: [file.stat().st_size, crc32(file)] for file in sorted(folder.iterdir()) if is_payload(file)}
    manifest = json.dumps({"format": FORMAT, **facts, "files": files}, indent=1)
    replace_durably(folder / MANIFEST, lambda path: path.write_text(manifest))
    replace_durably(folder.parent / LATEST, lambda path: path.write_text(folder.name))


def is_payload(file: Path) -> bool:
    return file.suffix in (".pt", ".safetensors", ".json") and file.name != MANIFEST


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all there and unchanged.

    Raises:
        UserError: when the folder is incomplete or damaged; says which file and how.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = [(name, size, crc) for name, (size, crc) in manifest["files"].items()]
    except FileNotFoundError:
        raise UserError(
            f"{folder} is not a complete checkpoint: it has no {MANIFEST}; give a folder such as "
            f"OUT/checkpoints/{tag_of(1000)}, or --resume auto."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{folder} is damaged: its {MANIFEST} cannot be read; {ELSEWHERE}") from None
    if manifest.get("format") != FORMAT:
        raise UserError(f"{folder} has checkpoint format {manifest.get('format')}; this version reads format {FORMAT}.")
    for name, size, crc in files:
        file = folder / name
        if not file.is_file():
            raise UserError(f"{folder} is damaged: {name} is missing; {ELSEWHERE}")
        if file.stat().st_size != size or crc32(file) != crc:
            raise UserError(f"{folder} is damaged: {name} is not as it was written; {ELSEWHERE}")
    return dict(manifest)


def newest_valid(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint and what is wrong with newer ones.

    Raises:
        UserError: when there are sealed checkpoints but none is sound.
    """
    problems = []
    for folder in sorted(tags(checkpoints), reverse=True):
        if not (folder / MANIFEST).exists():  # a save that was cut off
            problems.append(f"{folder} is incomplete (the run was stopped while saving); it is passed over.")
            continue
        try:
            read_manifest(folder)
            return folder, problems
        except UserError as error:
            problems.append(str(error))
    if any("damaged" in problem for problem in problems):
        raise UserError(
            f"no checkpoint in {checkpoints} can be used. {' '.join(problems)} "
            f"Restore one from a copy, or start anew with --overwrite."
        )
    return None, problems


def tags(checkpoints: Path) -> list[Path]:
    if not checkpoints.is_dir():
        return []
    return [folder for folder in checkpoints.iterdir() if re.fullmatch(r"step-\d{8,}", folder.name)]


def prune(checkpoints: Path, keep: int) -> None:
    """Delete all but the newest `keep` sealed checkpoints, and unsealed ones older than the newest."""
    sealed = sorted(folder for folder in tags(checkpoints) if (folder / MANIFEST).exists())
    for folder in tags(checkpoints):
        if sealed and folder < sealed[-1] and folder not in sealed[-keep:]:
            discard(folder)


def discard(folder: Path) -> None:
    """Remove a checkpoint, its manifest first: a kill in between leaves an incomplete one, not a damaged one."""
    if folder.exists():
        (folder / MANIFEST).unlink(missing_ok=True)
        sync(folder)
        shutil.rmtree(folder)
