"""What a run warns of before its first step: settings that are allowed and may not be meant."""

import torch

from ..command_line import load_preset
from ..config import Settings, TokenizerSettings
from ..cpu import has_bf16
from ..tokenizer.flops import DALLE, size_of
from .optim import asked_warmup


def slow_precision(device: torch.device, *, bf16: bool) -> list[str]:
    """A warning when the precision asked for is one that the processor has to imitate."""
    if device.type != "cpu" or not bf16 or has_bf16():
        return []
    return ["train.precision = bf16 is many times slower than fp32 on this processor, which has no bf16; use fp32."]


def long_warm_up(settings: Settings, total_steps: int, steps_per_epoch: int) -> list[str]:
    """A warning when the warm-up takes the whole run."""
    optim, train = settings.optim, settings.train
    warmup = asked_warmup(optim, steps_per_epoch)
    if warmup < total_steps:
        return []
    name = "optim.warmup_epochs" if optim.warmup_steps is None else "optim.warmup_steps"
    value = optim.warmup_epochs if optim.warmup_steps is None else optim.warmup_steps
    length = "train.epochs" if train.max_steps is None else "train.max_steps"
    return [
        f"{name} = {value:g} is a warm-up of {warmup:,} steps and the run has {total_steps:,}, so the learning rate "
        f"rises to the end and never falls; lower {name} or raise {length}."
    ]


def other_tokens(settings: Settings) -> list[str]:
    """A warning when a published recipe is run without the published tokenizer, whose codes are its targets."""
    published = TokenizerSettings.model_validate(load_preset(settings.preset)["tokenizer"])
    if settings.tokenizer.path is not None or size_of(published) != DALLE:
        return []
    return [
        f"preset {settings.preset} predicts the tokens of DALL-E's encoder, and without --tokenizer.path this run "
        f"predicts those of a tokenizer trained on its own pictures, so its losses are not the recipe's; to follow it, "
        f"give that encoder's state dict as --tokenizer.path (docs/recipes.md says how)."
    ]
