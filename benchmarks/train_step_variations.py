"""Our step with one thing changed: tokens made in the step or beside it, DeepSpeed at ZeRO stage 1, no DeepSpeed."""

import copy
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_beit.engine.config import ZeroSettings
from fused_beit.engine.data.loading import Batch, Making
from fused_beit.engine.training.prefetch import feed
from fused_beit.engine.training.timeline import Timeline
from fused_beit.engine.training.zero import ZeroEngine

from .engine_runtime import runtime
from .step_names import BESIDE, IN_THE_LOOP, NO_DEEPSPEED, ZERO_1, by_triton
from .tokenizer import check_ids, scores_of
from .train_step import (
    BF16,
    PICTURES_AT_ONCE,
    Case,
    Step,
    frozen_tokenizer,
    make_token_ids,
    token_views,
    watched,
)
from .train_step_providers import fused_beit, how, ours, peer


@dataclass(frozen=True)
class InTheLoop(Case):
    """A case whose tokens are made anew whenever a step asks for them, as in a run without a cache of tokens."""

    impl: str = "auto"

    @property
    def token_ids(self) -> Tensor:  # type: ignore[override]
        return make_token_ids(self.shape, self.impl)


def tokenizer_in_the_loop(case: Case, impl: str = "auto") -> Step:
    """The engine's step after the tokenizer's pass over uint8 views, as the training loop calls both.

    Raises:
        AssertionError: where the tokenizer chooses a worse code than plain torch would.
    """
    step = fused_beit(InTheLoop(case.name, case.shape, case.dtype, case.note, case.rehearsal, impl), impl)
    check_tokens(case, impl)
    return replace(step, about=f"{step.about}; the tokenizer's pass before it")


def check_tokens(case: Case, impl: str) -> None:
    """Hold the tokenizer's codes to those of plain torch."""
    assert case.shape.tokenizer is not None
    tokenizer, few = frozen_tokenizer(case.shape.tokenizer, impl), token_views(case.shape)[:PICTURES_AT_ONCE]
    exact = scores_of(copy.deepcopy(tokenizer).double(), few)
    with case.autocast():
        eager = scores_of(tokenizer, few)
    check_ids("the tokenizer", make_token_ids(case.shape, impl)[:PICTURES_AT_ONCE], eager, exact)


def tokenizer_beside(case: Case, impl: str = "auto") -> Step:
    """The engine's step as it is with `train.prefetch` tokens: on a GPU the next tokens are made while it runs.

    The pictures are on the device already, so that only where the tokenizer runs differs from `tokenizer_in_the_loop`.

    Raises:
        AssertionError: where the tokenizer chooses a worse code than plain torch would.
    """
    assert case.shape.tokenizer is not None
    model = ours(case, impl)
    check_tokens(case, impl)
    engine = ZeroEngine(model, case.run_settings(impl), runtime(), bf16=case.dtype == BF16)
    ahead = feed(same_batch(case), engine, frozen_tokenizer(case.shape.tokenizer, impl), "tokens")
    enter = Timeline().enter

    def forward() -> Tensor:
        batch, token_ids = ahead.take(enter)
        loss: Tensor = engine(batch.patch_view, batch.masked_positions, token_ids)[0]
        ahead.begin_next(enter)
        return loss

    return Step(
        case,
        model,
        forward,
        lambda: model.logits(case.pixels, case.masked_positions).flatten(0, 1),
        engine.backward,
        engine.step,
        engine.optimizer,
        watched(model),
        f"the engine's own step: DeepSpeed at ZeRO stage 0, GuardedAdamW{how(impl)}; the next tokens made beside it",
    )


def same_batch(case: Case) -> Generator[Batch]:
    """The case's pictures again and again."""
    ids = torch.arange(case.shape.batch, device=case.pixels.device)
    while True:
        yield Batch(case.pixels, token_views(case.shape), case.masked_positions, ids, [], Making(0, 0.0, 0.0))


@dataclass(frozen=True)
class ShardedStep(Step):
    """A step at ZeRO stage 1, whose gradients and moments are parts of flat tensors of DeepSpeed's."""

    optimizer: Any
    """DeepSpeed's, around torch's."""

    def gradient(self, weight: Any) -> Tensor | None:
        gradient: Tensor | None = weight.get_full_hp_grad()
        return gradient

    def moment(self, weight: Any) -> Tensor:
        # Not by DeepSpeed's own look-up: 0.19.8 links only the first parameter group to its optimizer's state.
        part = weight._hp_mapping
        flat = self.optimizer.single_partition_of_fp32_groups[part.param_group_index]
        moments: Tensor = self.optimizer.optimizer.state[flat]["exp_avg"]
        return moments.narrow(0, part.hp_fragment_address.start, part.hp_fragment_address.numel).view_as(weight)


def zero_1(case: Case, impl: str = "auto") -> Step:
    """The engine's step as on many ranks, where stage 1 is the default, on the one that there is."""
    settings = case.run_settings(impl).model_copy(update={"zero": ZeroSettings(stage=1)})
    model = ours(case, impl)
    engine = ZeroEngine(model, settings, runtime(), bf16=case.dtype == BF16)
    return ShardedStep(
        case,
        model,
        lambda: engine(case.pixels, case.masked_positions, case.token_ids)[0],
        lambda: model.logits(case.pixels, case.masked_positions).flatten(0, 1),
        engine.backward,
        engine.step,
        engine.optimizer,
        watched(model),
        f"the engine's step: DeepSpeed at ZeRO stage 1, torch.optim.AdamW(fused=True){how(impl)}",
    )


def no_deepspeed(case: Case, impl: str = "auto") -> Step:
    """The same model and optimizer as at stage 1, in plain torch."""
    return peer(
        case,
        ours(case, impl),
        lambda called: called(case.pixels, case.masked_positions, case.token_ids)[0],
        lambda model: model.logits(case.pixels, case.masked_positions).flatten(0, 1),
        str,
        compiled=False,
        fused=True,
    )


BY_AUTO: dict[str, Callable[..., Step]] = {
    IN_THE_LOOP: tokenizer_in_the_loop,
    BESIDE: tokenizer_beside,
    ZERO_1: zero_1,
    NO_DEEPSPEED: no_deepspeed,
}
VARIED = BY_AUTO | {by_triton(name): partial(make, impl="triton") for name, make in BY_AUTO.items()}
