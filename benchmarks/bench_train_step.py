"""A whole training step, optimizer included: ours beside timm's and transformers' BEiT, in one process, in turn.

How to read it: `over first` is a provider's time over that of our step, the median of the ratios within the rounds;
its quartiles, GFLOP/s, the share of the measured matrix rate (MFU, where that rate was measured in the precision of the
case) and, on a GPU, peak memory are in the JSON. FLOPs are those that the step demands, the same for all.

All run in one process, with the same threads; on a CPU all of them have freed memory kept, as our engine asks of the
C library, which cannot keep it for one alone. Normalised pixels are given to the peers, ours normalises in the step.

On a CPU a step of BEiT-base takes seconds and its compilation long, so the compiled models are timed on one of its
twelve blocks, beside the same block not compiled: only times of one case compare. A processor without products of bf16
imitates them, many times slower than fp32; there the bf16 case is a small one.
"""

from collections.abc import Callable, Mapping

import pytest
import torch

from fused_beit.engine.config import ModelSettings
from fused_beit.engine.cpu import has_bf16

from .rounds import AbsentError, Drive, Row, every_round, quartiles, time_in_turn
from .spread import add_spread
from .timers import memory
from .train_step import DEVICE, Case, References, Shape, Step
from .train_step_providers import COMPILED, EAGER

pytestmark = pytest.mark.filterwarnings("ignore")  # of the peers and the compiler, which are not ours to mend

PROVIDERS = EAGER | COMPILED

TINY = ModelSettings(width=192, num_heads=3, drop_path=0.0)
SMALL = ModelSettings(width=384, num_heads=6, drop_path=0.0)
BASE = ModelSettings(drop_path=0.0)
LARGE = ModelSettings(width=1024, depth=24, num_heads=16, drop_path=0.0, layer_scale=1e-5)
BF16, FP32 = torch.bfloat16, torch.float32


def on_pictures(settings: ModelSettings, batch: int) -> Shape:
    """BEiT's pictures, visual tokens and masks."""
    return Shape(settings, image_size=224, vocab_size=8192, batch=batch, num_masked=75)


ON_GPU = {
    "base-bf16": Case("BEiT-base", on_pictures(BASE, 128), BF16),
    "large-bf16": Case("BEiT-large", on_pictures(LARGE, 64), BF16),
    "small-bf16": Case("BEiT-small", on_pictures(SMALL, 256), BF16),
    "tiny-bf16": Case("BEiT-tiny", on_pictures(TINY, 256), BF16),
    "base-fp32": Case("BEiT-base", on_pictures(BASE, 64), FP32),
}
NO_BF16 = "this processor has no products of bf16 and imitates them, far slower than fp32: a small case"
ONE_BLOCK = "compiled in the case of one block, to keep the run short"
ON_CPU = {
    "base-fp32": Case("BEiT-base", on_pictures(BASE, 4), FP32),
    "base-bf16": Case("BEiT-base", on_pictures(BASE, 4), BF16)
    if has_bf16()
    else Case(
        "2 blocks of BEiT-tiny at 112 pixels (no bf16 here)",
        Shape(TINY.model_copy(update={"depth": 2}), image_size=112, vocab_size=512, batch=1, num_masked=19),
        BF16,
        NO_BF16,
    ),
    "compiled-fp32": Case(
        "1 block of BEiT-base", on_pictures(BASE.model_copy(update={"depth": 1}), 4), FP32, ONE_BLOCK
    ),
}
SMOKE_SHAPE = Shape(
    ModelSettings(width=48, depth=1, num_heads=3, drop_path=0.0), image_size=64, vocab_size=64, batch=2, num_masked=6
)
SMOKE = {
    "fp32": Case("tiny", SMOKE_SHAPE, FP32),
    "bf16": Case("tiny", SMOKE_SHAPE, BF16),
}


DEFAULT_ATTENTION = "its default, sdpa, is timed here, and both in the case of one block"


def left_out(name: str) -> dict[str, str]:
    """Who is not timed in a case though it could be, and why."""
    if name in SMOKE:
        return dict.fromkeys(COMPILED, "smoke sizes compile nothing")
    if DEVICE.type == "cuda" or name.startswith("compiled"):
        return {}
    return dict.fromkeys(COMPILED, ONE_BLOCK) | {"transformers, eager": DEFAULT_ATTENTION}


def checked(
    case: Case, providers: Mapping[str, Callable[[Case], Step]]
) -> tuple[dict[str, Step], dict[str, str], dict[str, dict[str, float]]]:
    """The providers whose first step is right, why the others are absent, and their errors.

    Raises:
        AssertionError: where one computes something else.
    """
    references = References(case)
    runs, absent, errors = {}, {}, {}
    for provider, make in providers.items():
        try:
            run = make(case)
            errors[provider] = references.check(provider, run.outputs())
            runs[provider] = run
        except AbsentError as error:
            absent[provider] = str(error)
        except torch.OutOfMemoryError as error:
            absent[provider] = f"out of memory: {str(error).splitlines()[0]}"
    return runs, absent, errors


def timed(
    case: Case,
    runs: Mapping[str, Step],
    absent: Mapping[str, str],
    errors: Mapping[str, dict[str, float]],
    *,
    rounds: int,
    limits: Mapping[str, float],
    drive: Drive = every_round,
) -> list[Row]:
    """A row a provider, with its pictures/s, FLOP/s and, on a GPU, its peak memory."""
    peaks: dict[str, dict[str, int]] = {}
    absent = dict(absent)
    for provider, run in runs.items():
        try:
            peaks[provider] = memory(run, DEVICE) if DEVICE.type == "cuda" else {}
        except torch.OutOfMemoryError as error:
            absent[provider] = f"out of memory: {str(error).splitlines()[0]}"
    runs = {provider: runs[provider] for provider in peaks}
    rows = time_in_turn(str(case), runs, rounds=rounds, drive=drive, absent=absent, errors=errors)
    add_spread(rows)
    for row in rows:
        if row.seconds:
            row.facts |= peaks[row.provider] | rates(case, quartiles(row.seconds)[1], limits)
            row.facts["about"] = runs[row.provider].about
            row.facts |= {"note": case.note} if case.note else {}
    return rows


def rates(case: Case, seconds: float, limits: Mapping[str, float]) -> dict[str, float]:
    """Pictures/s, GFLOP/s, and MFU where the matrix rate was measured in this precision."""
    flops_per_s = case.shape.flops / seconds
    found = {"pictures_per_s": case.shape.batch / seconds, "gflop_per_s": flops_per_s / 1e9}
    of_the_limit = BF16 if DEVICE.type == "cuda" else FP32  # as machine.limits measures it
    return found | ({"mfu": flops_per_s / limits["flops_per_s"]} if case.dtype == of_the_limit else {})


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = ON_GPU if DEVICE.type == "cuda" else ON_CPU
    cases = SMOKE if metafunc.config.getoption("--sizes") == "smoke" else full
    metafunc.parametrize(("name", "case"), [(name, case) for name, case in cases.items()], ids=list(cases))


def test_train_step(drive, keep, limits, num_rounds, name, case):
    out = left_out(name)
    runs, absent, errors = checked(case, {key: make for key, make in PROVIDERS.items() if key not in out})
    assert "fused_beit" in runs, f"our own step cannot run: {absent['fused_beit']}"
    rounds = num_rounds(3 if name == "base-fp32" and DEVICE.type == "cpu" else 5)
    keep(timed(case, runs, absent | out, errors, rounds=rounds, limits=limits, drive=drive))
