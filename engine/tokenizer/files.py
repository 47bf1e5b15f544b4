"""Tokenizers on the disk: one safetensors file that says what it holds, or DALL-E's weights as published.

The metadata of our file: `format`, `version`, `sizes` (the constructor's arguments), `sha256` of the weights and, where
one was given, `recipe`: a fingerprint of what the tokenizer was trained from.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError
from .dvae import DiscreteVAE
from .published import load_published

FILE_NAME = "tokenizer.safetensors"
FORMAT = "fused_beit.tokenizer"
VERSION = "1"


def save_tokenizer(model: DiscreteVAE, path: str | Path, *, recipe: str | None = None) -> None:
    """Write a tokenizer; an earlier file is replaced in one move, once the new one is safe on the disk.

    recipe: kept in the file, for `read_recipe`
    """
    path = Path(path)
    state = saved_state(model)
    metadata = {"format": FORMAT, "version": VERSION, "sizes": json.dumps(model.sizes), "sha256": digest(state)}
    if recipe is not None:
        metadata["recipe"] = recipe
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.touch()
    mode = temporary.stat().st_mode
    save_file(state, temporary, metadata)
    temporary.chmod(mode)  # the writer makes a file that others may not read
    for file, then in ((temporary, lambda: os.replace(temporary, path)), (path.parent, lambda: None)):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        then()


def load_tokenizer(path: str | Path) -> DiscreteVAE:
    """A tokenizer, frozen and in evaluation mode, on the CPU in fp32.

    path: a file of `save_tokenizer`, DALL-E's encoder as a state dict, or a folder that holds one of them

    Raises:
        UserError: for a file that is missing, damaged, of another kind or pickled code.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"the tokenizer {path} does not exist; give an existing file.")
    if (path / FILE_NAME).is_file():
        path = path / FILE_NAME
    metadata = read_metadata(path)
    model = load_published(path) if metadata is None else load_own(path, metadata)
    return model.eval().requires_grad_(False)


def read_recipe(path: str | Path) -> str | None:
    """The recipe that `save_tokenizer` was given; None where there is none or the file cannot be read."""
    try:
        metadata = read_metadata(Path(path))
    except UserError:
        return None
    return None if metadata is None else metadata.get("recipe")


def identity(model: DiscreteVAE) -> str:
    """A name for exactly these weights, for the record of a run: `sha256:` and 16 hexadecimal digits."""
    return f"sha256:{digest(saved_state(model))[:16]}"


def read_metadata(path: Path) -> dict[str, str] | None:
    """Metadata of our own format; None for a file or folder of any other."""
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError):
        raise UserError(f"the tokenizer {path} is damaged or no safetensors file; train or fetch it again.") from None
    return metadata if metadata.get("format") == FORMAT else None


def load_own(path: Path, metadata: dict[str, str]) -> DiscreteVAE:
    """A file of `save_tokenizer`, checked against its metadata."""
    if metadata.get("version") != VERSION:
        raise UserError(
            f"the tokenizer {path} has format version {metadata.get('version')}, and this version reads {VERSION}; "
            f"use the version that wrote it, or train it again."
        )
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if digest(state) != metadata["sha256"]:
            raise ValueError("the weights are not those that were written")
        with torch.device("meta"):
            model = DiscreteVAE(**json.loads(metadata["sizes"]))
        model.load_state_dict(state, assign=True)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError):
        raise UserError(f"the tokenizer {path} is damaged: it is not as it was written; train it again.") from None
    return model


def saved_state(model: DiscreteVAE) -> dict[str, Tensor]:
    """Weights as they are written: fp32, on the CPU, contiguous."""
    return {name: value.detach().float().cpu().contiguous() for name, value in model.state_dict().items()}


def digest(state: dict[str, Tensor]) -> str:
    """SHA-256 of names, shapes and values."""
    sha = hashlib.sha256()
    for name, value in sorted(state.items()):
        sha.update(f"{name} {list(value.shape)}".encode())
        sha.update(value.numpy().data)
    return sha.hexdigest()
