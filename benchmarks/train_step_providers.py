"""Who makes the training step: our engine, timm's and transformers' BEiT, each as it is and compiled.

Weights, loss and the optimizer's settings are the same; how the step is made is what each one's user has by default:
ours by `ZeroEngine`, as a run makes it; timm's by torch's AdamW as `create_optimizer_v2` builds it, transformers' by
the fused one that is its Trainer's default; both clip by `clip_grad_norm_`. All decay the parameters that BEiT's recipe
decays. Ours is there by Triton too, as `--train.impl triton` has it.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fused_beit.engine.models.mim import MaskedImageModel
from fused_beit.engine.training.optim import GuardedAdamW, parameter_groups
from fused_beit.engine.training.zero import ZeroEngine

from . import step_names as names
from . import timm_beit, transformers_beit
from .engine_runtime import runtime
from .providers import refuse_the_interpreter
from .rounds import AbsentError
from .train_step import DEVICE, OPTIM, Case, Step, our_model, watched


def ours(case: Case, impl: str) -> MaskedImageModel:
    """Our model, its operators by `impl`. Raises AbsentError for Triton where only its interpreter could run it."""
    if impl == "triton":
        refuse_the_interpreter(case, DEVICE)
    return our_model(case.shape, impl)


def how(impl: str) -> str:
    return "" if impl == "auto" else f", impl={impl}"


def fused_beit(case: Case, impl: str = "auto", *, compiled: bool = False) -> Step:
    """Our model under DeepSpeed, from uint8 pixels to the new weights."""
    model = ours(case, impl)
    if compiled:  # as --train.compile does
        model.encoder.compile_blocks()
    engine = ZeroEngine(model, case.run_settings(impl), runtime(), bf16=case.dtype == torch.bfloat16)
    optimizer = engine.optimizer
    assert isinstance(optimizer, GuardedAdamW), "one rank has stage 0, which has this optimizer"

    def forward() -> Tensor:
        loss, _ = engine(case.pixels, case.masked_positions, case.token_ids)
        return loss

    def logits() -> Tensor:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            return model.logits(case.pixels, case.masked_positions).flatten(0, 1)

    return first_run(
        Step(
            case,
            model,
            forward,
            logits,
            engine.backward,
            engine.step,
            optimizer,
            watched(model),
            f"the engine's own step: DeepSpeed at ZeRO stage 0, GuardedAdamW{how(impl)}",
        ),
        compiled,
    )


def peer(
    case: Case,
    model: nn.Module,
    forward: Callable[[nn.Module], Tensor],
    logits: Callable[[nn.Module], Tensor],
    rename: Callable[[str], str],
    *,
    compiled: bool,
    **options: Any,
) -> Step:
    """A step of a plain torch model; `options` are those of AdamW."""
    groups = parameter_groups(model, OPTIM.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps, **options)
    called = torch.compile(model, dynamic=False) if compiled else model
    parameters = list(model.parameters())
    assert OPTIM.clip_grad is not None
    largest_norm = OPTIM.clip_grad

    def run() -> Tensor:
        with case.autocast():
            return forward(called)

    def update() -> None:
        nn.utils.clip_grad_norm_(parameters, largest_norm)
        optimizer.step()
        optimizer.zero_grad()

    about = f"clip_grad_norm_, torch.optim.AdamW({'fused=True' if options else ''})"
    step = Step(
        case,
        model,
        run,
        lambda: logits(model),
        Tensor.backward,
        update,
        optimizer,
        watched(model, rename),
        about,
    )
    return first_run(step, compiled)


def timm(case: Case, *, compiled: bool = False) -> Step:
    shape = case.shape
    with DEVICE:
        model = timm_beit.build_peer(shape.settings, shape.image_size, shape.vocab_size, case.state)
    pixels, masked, targets = case.normalized, case.masked_positions, case.targets
    return peer(
        case,
        model,
        lambda called: called(pixels, masked, targets),
        lambda model: model.logits(pixels, masked),
        timm_beit.rename,
        compiled=compiled,
    )


def transformers(case: Case, attention: str = "sdpa", *, compiled: bool = False) -> Step:
    shape = case.shape
    with DEVICE:
        model = transformers_beit.build_peer(
            shape.settings, shape.image_size, shape.vocab_size, case.state, attention=attention
        )
    pixels = case.normalized
    mask = torch.zeros(shape.batch, shape.num_patches, dtype=torch.bool, device=DEVICE)
    mask.scatter_(1, case.masked_positions, True)
    return peer(
        case,
        model,
        lambda called: called(pixels, bool_masked_pos=mask, labels=case.targets).loss,
        lambda model: model(pixels, bool_masked_pos=mask).logits[mask],
        transformers_beit.rename,
        compiled=compiled,
        fused=True,
    )


def first_run(step: Step, compiled: bool) -> Step:
    """The step, its forward and backward compiled where they are to be.

    Raises:
        AbsentError: where the compiler cannot do it; says why.
    """
    if not compiled:
        return step
    try:
        step.backward(step.forward())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        why = str(error).strip().splitlines()[0]
        raise AbsentError(f"torch.compile failed: {type(error).__name__}: {why}") from None
    for parameter in step.model.parameters():
        parameter.grad = None
    return step


EAGER: dict[str, Callable[[Case], Step]] = {
    names.OURS: fused_beit,
    names.TRITON: partial(fused_beit, impl="triton"),
    names.TIMM: timm,
    "transformers, sdpa": transformers,
    "transformers, eager": partial(transformers, attention="eager"),
}
COMPILED: dict[str, Callable[[Case], Step]] = {
    names.OURS_COMPILED: partial(fused_beit, compiled=True),
    names.TRITON_COMPILED: partial(fused_beit, impl="triton", compiled=True),
    names.TIMM_COMPILED: partial(timm, compiled=True),
    names.TRANSFORMERS_COMPILED: partial(transformers, compiled=True),
}
