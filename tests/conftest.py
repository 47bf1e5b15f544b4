"""What holds for every test: no network, no oversubscribed cores, and GPU tests only where there is a GPU."""

import os
import sys
from collections.abc import Generator, Iterator
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
    """Choose, before anything imports triton, whether its kernels are interpreted: where there is no GPU, or if asked.

    A process has them one way only. Which tests are selected is not known yet, and so plays no part.
    """
    from fused_beit.engine.cpu import keep_compiled_code_apart
    from fused_beit.kernels._triton import target  # imports no triton

    keep_compiled_code_apart()
    why_not = target.why_not_interpreted() if target.installed() else None
    if interpreted() and why_not:
        raise pytest.UsageError(f"{why_not}, or TRITON_INTERPRET=0, which leaves its tests out")
    if not torch.cuda.is_available() and not why_not:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if torch.cuda.is_available() and not interpreted():
        # Which warnings its driver and its versions of torch and triton give is not for these tests to say.
        config.addinivalue_line("filterwarnings", "default")


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@pytest.hookimpl(tryfirst=True)  # before xdist looks for groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is none; keep the tests that start processes on one worker."""
    no_gpu = None
    if not torch.cuda.is_available():
        no_gpu = pytest.mark.skip(reason="needs an NVIDIA GPU; torch finds none here")
    elif interpreted():
        no_gpu = pytest.mark.skip(reason="needs Triton compiled; run it without TRITON_INTERPRET=1")
    for item in items:
        if item.get_closest_marker("gpu") and no_gpu:
            item.add_marker(no_gpu)
        if item.get_closest_marker("distributed"):
            item.add_marker(pytest.mark.xdist_group("distributed"))  # two at a time would starve each other


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Skip a file that needs what is not installed, as the engine's tests need deepspeed.

    So a machine that has torch and triton alone runs the tests of the kernels. In an environment that make has
    completed everything must be there, and such a file fails.
    """
    report = yield
    call = getattr(report, "call", None)
    error = call.excinfo.value.__cause__ if report.failed and call and call.excinfo else None
    if isinstance(error, ModuleNotFoundError) and not COMPLETE.exists() and not is_ours(error.name):
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), None, f"Skipped: needs {error.name}, which is not installed here")
    return report


# Written by make when all is installed.
COMPLETE = Path(sys.prefix) / "installed"


def is_ours(module: str | None) -> bool:
    """Whether a module's absence is a mistake in any environment."""
    ours = {"fused_beit", "benchmarks", *(path.stem for path in Path(__file__).parent.glob("*.py"))}
    return module is None or module.split(".")[0] in ours


def has_gpu() -> bool:
    """Whether the machine has a GPU that was not hidden, though torch may not find it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") != ""
    return torch.cuda.is_available() or (visible and os.path.exists("/dev/nvidia0"))


def why_not_green(config: pytest.Config) -> str | None:
    """What is wrong with a run on a machine with a GPU that skipped all its tests for one; None if nothing is."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or not has_gpu():
        return None
    skipped, *ran = (
        [report for report in reporter.stats.get(outcome, []) if "gpu" in getattr(report, "keywords", ())]
        for outcome in ("skipped", "passed", "failed", "error", "xfailed", "xpassed")
    )
    if not skipped or any(ran):
        return None
    reasons = {report.longrepr[2].removeprefix("Skipped: ") for report in skipped}
    return f"this machine has a GPU, and all {len(skipped)} tests for one were skipped: {'; '.join(sorted(reasons))}"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail where nothing ran of what was to run on the GPU that there is."""
    if session.exitstatus == pytest.ExitCode.OK and why_not_green(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if why := why_not_green(config):
        terminalreporter.write_line(f"error: {why}", red=True)


LINEAR = torch.nn.functional.linear


@pytest.fixture(autouse=True)
def torchs_own_linear() -> Iterator[None]:
    """DeepSpeed at stage 3 puts a linear of its own, which saves other tensors, in the place of torch's for good."""
    yield
    torch.nn.functional.linear = LINEAR
