"""What holds for every test: no network, no oversubscribed cores, and GPU tests only where there is a GPU."""

import os
from collections.abc import Iterator
from pathlib import Path

# Set before anything imports torch or transformers.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# One thread a worker, and the same with one worker: sums, and so golden losses, depend on the number of threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# torch.compile would start a pool of processes, each of which loads torch, in every worker.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# It knows a graph by its operators' names, and would take one that another checkout compiled with other arguments.
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """Root of the repository."""
    return ROOT


def pytest_configure(config: pytest.Config) -> None:
    """Run Triton kernels in its interpreter, before anything imports triton; not where the tests for a GPU are run."""
    if config.option.markexpr != "gpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(tryfirst=True)  # before xdist looks for groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is none; keep the tests that start processes on one worker."""
    no_gpu = None
    if not torch.cuda.is_available():
        no_gpu = pytest.mark.skip(reason="needs an NVIDIA GPU; torch finds none here")
    elif os.environ.get("TRITON_INTERPRET") == "1":
        no_gpu = pytest.mark.skip(reason="needs Triton compiled; run it by `make test-gpu`, without the interpreter")
    for item in items:
        if item.get_closest_marker("gpu") and no_gpu:
            item.add_marker(no_gpu)
        if item.get_closest_marker("distributed"):
            item.add_marker(pytest.mark.xdist_group("distributed"))  # two at a time would starve each other


LINEAR = torch.nn.functional.linear


@pytest.fixture(autouse=True)
def torchs_own_linear() -> Iterator[None]:
    """DeepSpeed at stage 3 puts a linear of its own, which saves other tensors, in the place of torch's for good."""
    yield
    torch.nn.functional.linear = LINEAR
