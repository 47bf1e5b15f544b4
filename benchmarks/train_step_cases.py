"""What a training step is timed on, and who is timed in one round with whom."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from fused_beit.engine.config import ModelSettings
from fused_beit.engine.cpu import has_bf16

from . import step_names as names
from .tokenizer import DALL_E, TokenizerShape
from .train_step import DEVICE, Case, Shape, Step
from .train_step_providers import COMPILED, EAGER
from .train_step_variations import VARIED

PROVIDERS: dict[str, Callable[[Case], Step]] = EAGER | COMPILED | VARIED

TINY = ModelSettings(width=192, num_heads=3, drop_path=0.0)
SMALL = ModelSettings(width=384, num_heads=6, drop_path=0.0)
BASE = ModelSettings(drop_path=0.0)
LARGE = ModelSettings(width=1024, depth=24, num_heads=16, drop_path=0.0, layer_scale=1e-5)
BF16, FP32 = torch.bfloat16, torch.float32


def on_pictures(settings: ModelSettings, batch: int) -> Shape:
    """BEiT's pictures, visual tokens and masks."""
    return Shape(settings, image_size=224, vocab_size=8192, batch=batch, num_masked=75)


# With every patch but one masked, and so few visual tokens that the head is no more of it: as the blocks before the
# last, for of the last one ours computes what the masked patches need alone.
ALONE = Shape(BASE.model_copy(update={"depth": 1}), image_size=224, vocab_size=3136, batch=4, num_masked=195)


ON_GPU = {
    names.BASE: Case("BEiT-base", on_pictures(BASE, 128), BF16),
    names.LARGE: Case("BEiT-large", on_pictures(LARGE, 64), BF16),
    "small-bf16": Case("BEiT-small", on_pictures(SMALL, 256), BF16),
    "tiny-bf16": Case("BEiT-tiny", on_pictures(TINY, 256), BF16),
    "base-fp32": Case("BEiT-base", on_pictures(BASE, 64), FP32),
}
IMITATED = "this processor has no products of bf16 and imitates them, far slower than fp32"
ONE_BLOCK = "compiled in the case of one block, to keep the run short"
ON_CPU = {
    "base-fp32": Case("BEiT-base", on_pictures(BASE, 4), FP32),
    "base-bf16": Case("BEiT-base", on_pictures(BASE, 4), BF16, "" if has_bf16() else IMITATED),
    "compiled-fp32": Case("1 block of BEiT-base, all but one patch masked", ALONE, FP32, ONE_BLOCK),
}
IN_PLACE_OF_IMITATED = Case(
    "2 blocks of BEiT-tiny at 112 pixels (no bf16 here)",
    Shape(TINY.model_copy(update={"depth": 2}), image_size=112, vocab_size=512, batch=1, num_masked=19),
    BF16,
    f"{IMITATED}: a small case",
)
SMOKE_SHAPE = Shape(
    ModelSettings(width=48, depth=1, num_heads=3, drop_path=0.0), image_size=64, vocab_size=64, batch=2, num_masked=6
)
SMOKE = {
    "fp32": Case("tiny", SMOKE_SHAPE, FP32),
    "bf16": Case("tiny", SMOKE_SHAPE, BF16),
}
SMOKE_TOKENIZER = TokenizerShape(side=16, vocab_size=64, width=16, groups=3, blocks_per_group=1)

DEFAULT_ATTENTION = "its default, sdpa, is timed here, and both in the case of one block"
NOT_COMPILED = "smoke sizes compile nothing"


class Round(NamedTuple):
    """A case, those who are timed in turn on it, and why others are not though they could be."""

    name: str
    group: str
    """Of `step_names.GROUPS`; "" for all that a processor's memory holds together."""
    case: Case
    providers: tuple[str, ...]
    left_out: dict[str, str]

    @property
    def label(self) -> str:
        return f"{self.case}, {self.group}" if self.group else str(self.case)

    def about(self) -> dict[str, Any]:
        """What the results say of a round beside its rows; of a group, what targets know it by too."""
        facts = {"pictures": self.case.shape.batch, "GFLOP": self.case.shape.flops / 1e9}
        return facts | ({"operator": names.SUBJECT, "name": self.name, "direction": self.group} if self.group else {})


def tokenized(case: Case, tokenizer: TokenizerShape) -> Case:
    """The case with visual tokens that are those of a tokenizer."""
    return replace(case, shape=replace(case.shape, tokenizer=tokenizer, tokens_in_bf16=case.dtype == BF16))


def group_of(name: str, group: str, case: Case, tokenizer: TokenizerShape) -> Round:
    case = tokenized(case, tokenizer) if group == names.VARIED else case
    return Round(name, group, case, names.GROUPS[group], {})


def of_everyone(name: str, case: Case, left_out: Mapping[str, str]) -> Round:
    providers = tuple(provider for provider in EAGER | COMPILED if provider not in left_out)
    return Round(name, "", case, providers, dict(left_out))


def on_gpu() -> list[Round]:
    return [group_of(name, group, ON_GPU[name], DALL_E) for name, group in names.ROUNDS]


def rehearsal() -> list[Round]:
    """Small, and in fp32, which every processor has; under the names of what they stand for."""
    tiny = {
        name: replace(SMOKE["fp32"], name=f"tiny in place of {name}", rehearsal=True) for name, _ in names.REHEARSED
    }
    return [group_of(name, group, tiny[name], SMOKE_TOKENIZER) for name, group in names.REHEARSED]


def on_cpu(*, imitated: bool) -> list[Round]:
    """`imitated`: BEiT-base in bf16 even where the processor imitates it, which takes minutes a step."""
    few = dict.fromkeys(COMPILED, ONE_BLOCK) | {"transformers, eager": DEFAULT_ATTENTION}
    cases = ON_CPU if has_bf16() or imitated else ON_CPU | {"base-bf16": IN_PLACE_OF_IMITATED}
    return [of_everyone(name, case, {} if name.startswith("compiled") else few) for name, case in cases.items()]


def smoke() -> list[Round]:
    everyone = [of_everyone(name, case, dict.fromkeys(COMPILED, NOT_COMPILED)) for name, case in SMOKE.items()]
    return [*everyone, group_of("bf16", names.VARIED, SMOKE["bf16"], SMOKE_TOKENIZER)]


def rounds(sizes: str, *, imitated: bool) -> list[Round]:
    """Those of `full` or `smoke` sizes on the device that there is; `imitated` as in `on_cpu`."""
    if sizes == "smoke":
        return smoke()
    return on_gpu() if DEVICE.type == "cuda" else on_cpu(imitated=imitated)
