"""What training on a CPU asks of the C library."""

import subprocess
import sys

import pytest

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
