"""The tokenizer of a pre-training: the one given, the one kept in the output folder, or one trained first."""

import hashlib
import json

import torch

from ..config import Settings, result_settings
from ..data.source import Source
from ..tokenizer.dvae import DiscreteVAE
from ..tokenizer.files import load_tokenizer, read_recipe, save_tokenizer
from ..tokenizer.training import train
from . import zero
from .run_folder import RunFolder


def prepare_tokenizer(
    settings: Settings, folder: RunFolder, pictures: Source, runtime: zero.Runtime
) -> tuple[DiscreteVAE, dict[str, str]]:
    """The frozen tokenizer on the run's device, and facts about it for the header.

    Trained on rank 0 alone, with the threads that one rank would have, so that every world size gets the same one.
    """
    path = settings.tokenizer.path
    if path is None:
        path = folder.tokenizer
        if runtime.rank == 0 and not (path.exists() and read_recipe(path) == recipe(settings)):
            threads = torch.get_num_threads()
            torch.set_num_threads(settings.train.threads or threads * runtime.local_world_size)
            print(f"no tokenizer was given: training one first, kept as {path}", flush=True)
            tokenizer = train(settings, pictures, runtime.device)
            save_tokenizer(tokenizer, path, recipe=recipe(settings))
            torch.set_num_threads(threads)
        zero.barrier()
    tokenizer = load_tokenizer(path).to(runtime.device)
    return tokenizer, {"file": str(path), "codes": str(tokenizer.vocab_size), "pixels a token": str(tokenizer.stride)}


def recipe(settings: Settings) -> str:
    """Fingerprint of everything a trained tokenizer depends on."""
    values = {
        name: value
        for name, value in result_settings(settings).items()
        if name.startswith(("data.", "tokenizer.")) or name in ("train.seed", "train.precision", "model.patch_size")
    }
    return hashlib.sha256(json.dumps(values, default=str, sort_keys=True).encode()).hexdigest()[:16]
