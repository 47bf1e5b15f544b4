"""Options of the benchmarks, the machine's facts in their JSON, and the table of ratios at the end."""

import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from .rounds import ROWS, Row, Run, table, time_in_turn

VERSIONS = ("torch", "triton", "transformers", "timm", "xformers", "deepspeed", "numpy", "pillow")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sizes",
        choices=("full", "smoke"),
        default="full",
        help="full: sizes of real models; smoke: small ones, to see that the benchmarks run (their times mean nothing)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture(scope="session")
def sizes(request: pytest.FixtureRequest) -> str:
    """`full` or `smoke`."""
    return request.config.getoption("--sizes")


@pytest.fixture
def in_turn(benchmark: Any, request: pytest.FixtureRequest, sizes: str) -> Callable[..., list[Row]]:
    """`time_in_turn` with this run's number of rounds, its rows kept for the table at the end."""

    def run(case: str, runs: Mapping[str, Run], *, rounds: int = 9, **kwargs: Any) -> list[Row]:
        rows = time_in_turn(benchmark, case, runs, rounds=2 if sizes == "smoke" else rounds, **kwargs)
        request.config.stash[ROWS].extend(rows)
        return rows

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Add what a reader needs to judge a time by; pytest-benchmark adds the commit itself."""
    machine_info |= {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: version for name in VERSIONS if (version := installed(name))},
        "sizes": config.getoption("--sizes"),
    }


def processor() -> str:
    """The processor's model, as the kernel names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The commit that is measured, marked where files differ from it."""
    root = Path(__file__).parent
    shown = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    return shown.stdout.strip() or "unknown"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if rows:
        terminalreporter.section("providers, timed in turn")
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
        threads = torch.get_num_threads()
        terminalreporter.line(f"{device}, {threads} threads, torch {torch.__version__}, commit {commit()}")
        if config.getoption("--sizes") == "smoke":
            terminalreporter.line("smoke sizes: these times say only that the benchmarks run")
        for line in table(rows):
            terminalreporter.line(line)
