"""The tokenizer of a pre-training: the one given, the one kept in the output folder, or one trained first."""

import hashlib
import json
from pathlib import Path

import torch

from ..config import Settings, result_settings
from ..data.source import Source
from ..errors import UserError
from ..tokenizer.dvae import DiscreteVAE
from ..tokenizer.files import identity, load_tokenizer, read_recipe, save_tokenizer
from ..tokenizer.training import train
from . import zero
from .checkpoint import replace_durably
from .run_folder import RunFolder


def prepare_tokenizer(
    settings: Settings,
    folder: RunFolder,
    pictures: Source,
    runtime: zero.Runtime,
    *,
    resume_from: Path | None,
    trained: bool = True,
) -> tuple[DiscreteVAE, dict[str, str]]:
    """The frozen tokenizer on the run's device, and facts about it for the header.

    Trained on rank 0 alone, with the threads that one rank would have, so that every world size gets the same one.

    trained: off, an untrained one of the same shape stands for one that would have to be trained: it is as fast
    """
    if settings.tokenizer.path is None and not trained:
        wanted = settings.tokenizer
        stand_in = DiscreteVAE(wanted.vocab_size, wanted.width, wanted.groups, wanted.blocks_per_group)
        stand_in.requires_grad_(False).eval().to(runtime.device)
        facts = {"file": "none, an untrained one stands for it", "codes": str(stand_in.vocab_size)}
        return stand_in, facts | {"pixels a token": str(stand_in.stride)}
    path = settings.tokenizer.path or folder.tokenizer
    if settings.tokenizer.path is None:

        def train_unless_kept() -> None:
            if resume_from is not None and not path.exists():  # resumed into another folder: take its tokenizer along
                kept = RunFolder(resume_from.parents[1]).tokenizer
                if kept.exists():
                    replace_durably(path, lambda temporary: temporary.write_bytes(kept.read_bytes()))
            if read_recipe(path) == recipe(settings):
                return
            if resume_from is not None:
                raise UserError(f"the tokenizer that {resume_from} was trained with is not at {path}; bring it back.")
            threads = torch.get_num_threads()
            torch.set_num_threads(settings.train.threads or threads * runtime.local_world_size)
            print(
                f"no tokenizer was given: training one first on {len(pictures):,} pictures, "
                f"{settings.tokenizer.train_steps:,} steps of {settings.tokenizer.batch_size}; kept as {path}",
                flush=True,
            )
            save_tokenizer(train(settings, pictures, runtime.device), path, recipe=recipe(settings))
            torch.set_num_threads(threads)

        zero.on_first_rank(train_unless_kept)
    tokenizer = load_tokenizer(path).to(runtime.device)
    facts = {"file": f"{path} ({identity(tokenizer)})", "codes": str(tokenizer.vocab_size)}
    return tokenizer, facts | {"pixels a token": str(tokenizer.stride)}


def recipe(settings: Settings) -> str:
    """Fingerprint of everything a trained tokenizer depends on."""
    values = {
        name: value
        for name, value in result_settings(settings).items()
        if name.startswith(("data.", "tokenizer.")) or name in ("train.seed", "train.precision", "model.patch_size")
    }
    return hashlib.sha256(json.dumps(values, default=str, sort_keys=True).encode()).hexdigest()[:16]
