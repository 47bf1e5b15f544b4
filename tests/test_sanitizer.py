"""No kernel reads or writes outside of its tensors, as compute-sanitizer sees it on a GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import every_kernel
import pytest
import torch
from triton_families import NEEDS_INTERPRETER

from fused_beit.kernels.rel_pos_attention.plan import attention_plan

SECONDS = 110
"""A package's share of ten minutes for all five."""

every_package = pytest.mark.parametrize("package", every_kernel.PACKAGES)


def test_every_package_of_kernels_is_among_those_that_are_watched(root):
    with_kernels = {
        path.parent.name for path in (root / "kernels").glob("[!_]*/*.py") if "_kernel(" in path.read_text()
    }
    assert with_kernels == every_kernel.PACKAGES.keys()


def test_attention_is_watched_in_every_family():
    """As an H100 takes them: by descriptors and pointers, masked or not."""
    plans = set()
    for case in every_kernel.ATTENTION:
        dtype = torch.bfloat16 if case.half else torch.float32
        plan = attention_plan("sm_90", case.head_dim, dtype, tma=case.aligned)
        plans.add((plan.tma, case.half, case.masked))
    assert plans == {
        (True, True, False),
        (True, True, True),
        (False, True, False),
        (False, False, False),
        (False, False, True),
    }


@NEEDS_INTERPRETER
@pytest.mark.slow
@every_package
def test_what_is_watched_runs(package, monkeypatch):
    """In the interpreter, where of attention a few tokens alone are quick enough."""
    pytest.importorskip("triton")
    few = [case._replace(num_tokens=10, head_dim=24) for case in every_kernel.ATTENTION]
    monkeypatch.setattr(every_kernel, "ATTENTION", dict.fromkeys(few))
    every_kernel.PACKAGES[package]("cpu")


@pytest.mark.gpu
@pytest.mark.slow
@every_package
def test_compute_sanitizer_finds_no_access_out_of_bounds(package):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer, of the CUDA toolkit, is not on PATH")
    # Every tensor in an allocation of its own, so that a step past its end is one into nothing.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    program = [sys.executable, str(Path(every_kernel.__file__)), package, "cuda"]
    command = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", *program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"done: {package}" in done.stdout
