"""A whole training step, optimizer included: ours beside timm's and transformers' BEiT, in one process, in turn.

How to read it: `over first` is a provider's time over that of our step, the median of the ratios within the rounds;
its quartiles, GFLOP/s, the share of the measured matrix rate (MFU, where that rate was measured in the precision of the
case) and, on a GPU, memory are in the JSON. FLOPs are those that the step demands, the same for all.

All run in one process, with the same threads; on a CPU all of them have freed memory kept, as our engine asks of the
C library, which cannot keep it for one alone. Normalised pixels are given to the peers, ours normalises in the step.

On a GPU the models of a round are there together, so that large ones are timed in groups, ours in each: as they are,
compiled, and ours with the tokenizer in the loop, with it beside the step, at ZeRO stage 1 and without DeepSpeed. On a
CPU a step of BEiT-base takes seconds and its compilation long, so the compiled models are timed on one of its twelve
blocks, beside the same block not compiled: only times of one case compare. All patches but one are masked there, for of
a last block ours computes what the masked ones need alone. A processor without products of bf16 imitates them, many
times slower than fp32; there the bf16 case is a small one, or with `--imitated-bf16` BEiT-base, which takes three
quarters of an hour.
"""

import pytest

from .rounds import Row
from .step_names import OURS, PEERS
from .train_step import DEVICE
from .train_step_cases import BASE, PROVIDERS, Round, rounds
from .train_step_timing import check_steps, time_steps

pytestmark = pytest.mark.filterwarnings("ignore")  # of the peers and the compiler, which are not ours to mend


def identity(one: Round) -> str:
    return "-".join(part.replace(" ", "_") for part in (one.name, one.group) if part)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    metafunc.parametrize("one", rounds(option("--sizes"), imitated=option("--imitated-bf16")), ids=identity)


def test_train_step(drive, keep, limits, num_rounds, benchmark, one):
    found = check_steps(one.case, {name: PROVIDERS[name] for name in one.providers})
    # A peer that failed is in the table and in the results with its reason, and costs nobody else a time.
    wrong = {name: why for name, why in found.failed.items() if name not in PEERS}
    assert not wrong, "; ".join(f"{name}: {why}" for name, why in wrong.items())
    assert OURS in found.steps, f"our own step cannot run: {found.absent[OURS]}"
    wanted = num_rounds(3 if one.case.shape.settings == BASE and DEVICE.type == "cpu" else 5)
    rows = time_steps(found, label=one.label, rounds=wanted, limits=limits, drive=drive)
    benchmark.extra_info |= one.about()
    keep([*rows, *(Row(one.label, name, absent=why) for name, why in one.left_out.items())])
