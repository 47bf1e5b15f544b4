"""What training on a CPU asks of the C library, and the warning about what the processor cannot do fast."""

import subprocess
import sys

import pytest
import torch

from fused_beit.engine.command_line import parse
from fused_beit.engine.training import pretraining

PAGES_OF_NEW_MEMORY = """
import resource, sys, torch
from fused_beit.engine.cpu import keep_freed_memory
if sys.argv[1] == "kept" and not keep_freed_memory():
    sys.exit("no mallopt")
torch.set_num_threads(1)
def step():
    held = [torch.empty(40 << 20, dtype=torch.uint8).fill_(1) for _ in range(4)]  # each too large to be kept by default
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages(how: str) -> int:
    command = [sys.executable, "-c", PAGES_OF_NEW_MEMORY, how]
    done = subprocess.run(command, capture_output=True, text=True)
    if "no mallopt" in done.stderr:
        pytest.skip("this C library has no mallopt")
    return int(done.stdout)


def test_a_step_reuses_the_memory_of_the_one_before():
    assert pages("kept") < pages("given back") / 10


@pytest.mark.parametrize(
    ("precision", "has_bf16", "warns"), [("bf16", False, 1), ("bf16", True, 0), ("auto", False, 0)]
)
def test_bf16_on_a_processor_without_it_is_warned_of(monkeypatch, precision, has_bf16, warns):
    monkeypatch.setattr(pretraining, "has_bf16", lambda: has_bf16)
    settings = parse(["--train.precision", precision], description="")
    assert len(pretraining.slow_precision(settings, torch.device("cpu"))) == warns
