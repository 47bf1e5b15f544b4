"""Options of the benchmarks, the machine's facts in their JSON, and the table of ratios at the end."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from . import machine
from .rounds import Drive, Row, summary, table, time_in_turn
from .timers import Run

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = pytest.StashKey[list[Row]]()


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


@pytest.fixture(scope="session")
def limits() -> dict[str, float]:
    """The machine's limits, measured before the first case that asks."""
    return machine.limits(DEVICE)


@pytest.fixture
def drive(benchmark: Any) -> Drive:
    """Rounds that pytest-benchmark drives; it keeps the wall times of the first provider."""

    def run(others: Callable[[], None], first: Callable[[], None], rounds: int) -> None:
        benchmark.pedantic(first, setup=others, rounds=rounds, iterations=1, warmup_rounds=0)

    return run


@pytest.fixture
def keep(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[list[Row]], list[Row]]:
    """Puts rows into the JSON and into the table at the end."""

    def run(rows: list[Row]) -> list[Row]:
        benchmark.extra_info["case"] = rows[0].case
        benchmark.extra_info["providers"] = {row.provider: summary(row) for row in rows}
        request.config.stash[ROWS].extend(rows)
        return rows

    return run


@pytest.fixture
def in_turn(
    drive: Drive, keep: Callable[[list[Row]], list[Row]], num_rounds: Callable[[int], int]
) -> Callable[..., list[Row]]:
    """`time_in_turn` with this run's number of rounds, its rows kept."""

    def run(case: str, runs: Mapping[str, Run], *, rounds: int = 9, **kwargs: Any) -> list[Row]:
        return keep(time_in_turn(case, runs, rounds=num_rounds(rounds), drive=drive, **kwargs))

    return run


@pytest.fixture(scope="session")
def num_rounds(sizes: str) -> Callable[[int], int]:
    """How many rounds are timed where so many are wanted."""
    return lambda wanted: 2 if sizes == "smoke" else wanted


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Add what a reader needs to judge a time by; pytest-benchmark adds the commit itself."""
    machine_info |= machine.facts(DEVICE) | {"sizes": config.getoption("--sizes")}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if rows:
        terminalreporter.section("providers, timed in turn")
        threads, commit = torch.get_num_threads(), machine.commit()
        terminalreporter.line(
            f"{machine.device_name(DEVICE)}, {threads} threads, torch {torch.__version__}, commit {commit}"
        )
        if config.getoption("--sizes") == "smoke":
            terminalreporter.line("smoke sizes: these times say only that the benchmarks run")
        for line in table(rows):
            terminalreporter.line(line)
