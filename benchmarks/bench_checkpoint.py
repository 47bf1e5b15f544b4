"""Saving and resuming a checkpoint: the engine's, durable and with checksums, beside torch.save of the same state.

The engine writes weights and optimizer state, the weights once more for other programs to read, and a checksum of every
file, and waits until all of it is on the disk; resuming reads every file twice, once for its checksum. Bytes/s are
those of the state, weights and two moments, that all providers must keep.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_beit.engine.config import DataSettings, MaskSettings, ModelSettings, Settings, TrainSettings
from fused_beit.engine.models.mim import MaskedImageModel
from fused_beit.engine.training import checkpoint
from fused_beit.engine.training.zero import ZeroEngine

from .engine_runtime import runtime
from .machine import output_of
from .rounds import quartiles, time_in_turn
from .spread import add_spread

pytestmark = pytest.mark.filterwarnings("ignore")  # DeepSpeed's

# Name, model, visual tokens.
SIZES: dict[str, tuple[str, ModelSettings, int]] = {
    "smoke": ("tiny", ModelSettings(width=48, depth=1, num_heads=3), 64),
    "full": ("BEiT-base", ModelSettings(), 8192)
    if torch.cuda.is_available()
    else ("BEiT-tiny", ModelSettings(width=192, num_heads=3), 8192),
}
STEP = 1000


def make_engine(sizes: str) -> ZeroEngine:
    """An engine after one optimizer step, so that its optimizer has a state."""
    _, model_settings, vocab_size = SIZES[sizes]
    started = runtime()
    settings = Settings(
        model=model_settings,
        data=DataSettings(image_size=32),  # its size is nothing to a checkpoint, but for the bias table
        mask=MaskSettings(num_patches=1),
        train=TrainSettings(global_batch=1, threads=started.threads),
    )
    torch.manual_seed(0)
    model = MaskedImageModel(model_settings, 32, vocab_size, normalize=settings.data.normalize)
    engine = ZeroEngine(model, settings, started, bf16=False)
    pixels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8, device=started.device)
    where, tokens = (torch.zeros(1, n, dtype=torch.int64, device=started.device) for n in (1, 4))
    loss, _ = engine(pixels, where, tokens)
    engine.backward(loss)
    engine.step()
    return engine


def state_of(engine: ZeroEngine) -> dict[str, Any]:
    """Weights and optimizer state as plain torch saves them."""
    return {"model": engine.module.state_dict(), "optimizer": engine.optimizer.state_dict()}


def spoil(engine: ZeroEngine) -> None:
    """Change all that is to be found again."""
    with torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.zero_()
            for value in engine.optimizer.state[parameter].values():
                value.zero_()


def copy_of(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: copy_of(value) for key, value in state.items()}
    return [copy_of(value) for value in state] if isinstance(state, list) else state


def assert_same(name: str, found: Any, wanted: Any, where: str = "state") -> None:
    """Bit for bit."""
    if isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted), f"{name}: {where} is not what was saved"
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), f"{name}: {where} has other keys"
        for key in wanted:
            assert_same(name, found[key], wanted[key], f"{where}.{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), f"{name}: {where} has another length"
        for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
            assert_same(name, one, other, f"{where}.{i}")


def bytes_of(state: Any) -> int:
    if isinstance(state, torch.Tensor):
        return state.nbytes
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return sum(bytes_of(part) for part in parts)


@dataclass(frozen=True)
class Keeper:
    """Keeps a run's state below a folder."""

    save: Callable[[], object]
    resume: Callable[[], object]
    folder: Path
    about: str


def fused_beit(engine: ZeroEngine, folder: Path) -> Keeper:
    def resume() -> None:
        sealed = folder / checkpoint.tag_of(STEP)
        checkpoint.read_manifest(sealed)
        engine.load(sealed)

    about = "DeepSpeed's files and model.safetensors, checksums, each file synced and moved into place"
    return Keeper(lambda: engine.save(folder, STEP, {"step": STEP}, {}), resume, folder, about)


def torch_save(engine: ZeroEngine, folder: Path, *, sync: bool = False) -> Keeper:
    path = folder / "state.pt"

    def save() -> None:
        torch.save(state_of(engine), path)
        if sync:
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def resume() -> None:
        state = torch.load(path, map_location=engine.runtime.device, weights_only=True)
        engine.module.load_state_dict(state["model"])
        engine.optimizer.load_state_dict(state["optimizer"])

    about = f"one file, overwritten in place, {'synced' if sync else 'left to the cache'}"
    return Keeper(save, resume, folder, about)


def torch_save_synced(engine: ZeroEngine, folder: Path) -> Keeper:
    return torch_save(engine, folder, sync=True)


PROVIDERS = {"fused_beit": fused_beit, "torch.save, synced": torch_save_synced, "torch.save": torch_save}


@pytest.fixture(scope="module")
def engine(sizes) -> ZeroEngine:
    return make_engine(sizes)


@pytest.fixture(scope="module")
def keepers(engine, tmp_path_factory) -> dict[str, Keeper]:
    """The providers, each of which finds the state again bit for bit."""
    keepers = {}
    for name, make in PROVIDERS.items():
        keepers[name] = keeper = make(engine, tmp_path_factory.mktemp("checkpoints"))
        wanted = copy_of(state_of(engine))
        keeper.save()
        spoil(engine)
        keeper.resume()
        assert_same(name, state_of(engine), wanted)
    return keepers


@pytest.mark.parametrize("what", ["save", "resume"])
def test_checkpoint(drive, keep, num_rounds, sizes, engine, keepers, what):
    size = bytes_of(state_of(engine))
    runs = {name: getattr(keeper, what) for name, keeper in keepers.items()}
    rows = time_in_turn(f"{what} {SIZES[sizes][0]}, {size / 1e6:.0f} MB", runs, rounds=num_rounds(3), drive=drive)
    add_spread(rows)
    for row in rows:
        folder = keepers[row.provider].folder
        row.facts |= {
            "about": keepers[row.provider].about,
            "state_bytes": size,
            "bytes_per_s": size / quartiles(row.seconds)[1],
            "bytes_on_disk": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
            "file_system": output_of("stat", "--file-system", "--format=%T", str(folder)),
        }
    keep(rows)
