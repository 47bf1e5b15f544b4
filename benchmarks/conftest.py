"""Options of the benchmarks, the fixtures that they share, and where their rows go: a table and files of results."""

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_beit.engine.cpu import keep_compiled_code_apart

from . import machine, results, text
from .measuring import Checked, about, check_providers, time_providers
from .operators import OPERATORS
from .providers import Operator
from .rounds import Drive, Row, hold_ratios, summary, table, time_in_turn
from .timers import Run

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = pytest.StashKey[list[Row]]()
LIMITS = pytest.StashKey[dict[str, Any]]()
FACTS = pytest.StashKey[dict[str, Any]]()
JSON = pytest.StashKey[Path]()
CASES_OF = {"full": "on_gpu" if DEVICE.type == "cuda" else "on_cpu", "smoke": "smoke"}
ROUNDS = {"full": 30, "smoke": 15}
SECONDS = {"full": 2.0 if DEVICE.type == "cpu" else 20.0, "smoke": 0.5}
"""What all providers of a case may take for one direction."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sizes",
        choices=("full", "smoke"),
        default="full",
        help="full: sizes of real models; smoke: small ones, to see that the benchmarks run (their times mean nothing)",
    )
    parser.addoption("--cases", help="of the operators, only these cases, as cpu,cpu-n577")
    parser.addoption("--providers", help="of the operators, only these providers, as triton,sdpa")
    parser.addoption(
        "--imitated-bf16",
        action="store_true",
        help="time the training step of BEiT-base in bf16 also on a processor that imitates it, minutes a step",
    )
    parser.addoption(
        "--keep-results",
        nargs="?",
        const=str(results.RESULTS),
        metavar="FOLDER",
        help="write FOLDER/<machine>/<subject>.json for each file of benchmarks, in pytest-benchmark's format, if all "
        f"goes well (default: {results.RESULTS.relative_to(machine.ROOT)}, for results to be committed)",
    )


def pytest_configure(config: pytest.Config) -> None:
    keep_compiled_code_apart()
    config.stash[ROWS] = []
    chosen_names(config, "case", case_names(config))
    chosen_names(config, "provider", provider_names())
    if DEVICE.type == "cpu" and config.getoption("--sizes") == "smoke":
        torch.set_num_threads(1)  # threads that wait for each other are most of the time of so small works
    if config.getoption("--keep-results"):
        prepare_results(config)


def chosen_names(config: pytest.Config, what: str, existing: set[str]) -> set[str]:
    """The names given by --cases or --providers; all where none are given. A name that there is not ends the run."""
    given = config.getoption(f"--{what}s")
    if given is None:
        return existing
    for name in given.split(","):
        if name not in existing:
            raise pytest.UsageError(f"there is no {what} {name!r}; there are: {', '.join(sorted(existing))}")
    return set(given.split(","))


def cases_of(operator: Operator, config: pytest.Config) -> tuple[Any, ...]:
    return getattr(operator, CASES_OF[config.getoption("--sizes")])


def case_names(config: pytest.Config) -> set[str]:
    return {case.name for operator in OPERATORS.values() for case in cases_of(operator, config)}


def provider_names() -> set[str]:
    return {name for operator in OPERATORS.values() for name in operator.providers}


def prepare_results(config: pytest.Config) -> None:
    """Refuse what would give files that must not be published; else have pytest-benchmark write its JSON aside."""
    for option in ("--cases", "--providers", "keyword"):
        if config.getoption(option):
            name = "-k" if option == "keyword" else option
            raise pytest.UsageError(f"--keep-results keeps whole files of benchmarks; leave {name} out")
    if any("::" in argument for argument in config.args):
        raise pytest.UsageError("--keep-results keeps whole files of benchmarks; name files and not single tests")
    to_commit = Path(config.getoption("--keep-results")).resolve().is_relative_to(results.RESULTS)
    if to_commit and config.getoption("--sizes") == "smoke":
        raise pytest.UsageError("smoke sizes mean nothing; keep their results in another folder: --keep-results FOLDER")
    if to_commit and machine.commit().endswith("-dirty"):
        raise pytest.UsageError(
            "files differ from the commit, so results would not say what was measured; commit first, or keep them in "
            "another folder: --keep-results FOLDER"
        )
    config.stash[JSON] = Path(tempfile.mkdtemp()) / "all.json"
    config.option.benchmark_json = config.stash[JSON]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Split pytest-benchmark's JSON by subject; nothing is kept of a run in which something failed."""
    path = session.config.stash.get(JSON, None)
    if path is None or not path.exists():
        return
    document = json.loads(path.read_text())
    path.unlink()
    path.parent.rmdir()
    if exitstatus == 0:
        folder = Path(session.config.getoption("--keep-results"))
        for written in results.write_subjects(document, folder / machine.folder_name(document["machine_info"])):
            print(f"\nwritten: {written}", end="")


@pytest.fixture(scope="session")
def sizes(request: pytest.FixtureRequest) -> str:
    """`full` or `smoke`."""
    return request.config.getoption("--sizes")


@pytest.fixture(scope="session", autouse=True)
def limits(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The machine's limits, measured before the first case; its facts are those of that moment too."""
    if not request.config.getoption("--benchmark-only"):
        return {}
    measured = machine.limits(DEVICE, small=request.config.getoption("--sizes") == "smoke")
    request.config.stash[LIMITS] = measured
    request.config.stash[FACTS] = machine.facts(DEVICE)
    return measured


@pytest.fixture
def drive(benchmark: Any) -> Drive:
    """Rounds that pytest-benchmark drives; `keep` puts the first provider's seconds in place of its wall times."""

    def run(others: Callable[[], None], first: Callable[[], None], rounds: int) -> None:
        benchmark.pedantic(first, setup=others, rounds=rounds, iterations=1, warmup_rounds=0)

    return run


@pytest.fixture
def keep(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[list[Row]], list[Row]]:
    """Puts rows into the JSON and into the table at the end.

    pytest-benchmark has timed the whole call of the timer, with all that the timer leaves out, such as the forward
    before a backward or the sleep before events. Its statistics are made of the first timed row's seconds instead.
    """

    def run(rows: list[Row]) -> list[Row]:
        timed = next((row for row in rows if row.seconds), None)
        if timed and benchmark.stats:
            benchmark.stats.stats.data[:] = timed.seconds
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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each case of the module's `OPERATORS`, in each of its directions, for a test that times them."""
    if "time_operator" not in metafunc.fixturenames:
        return
    cases = chosen_names(metafunc.config, "case", case_names(metafunc.config))
    operators = metafunc.module.OPERATORS
    found = [
        pytest.param((operator, case), id=f"{operator.name}-{case.name}")
        for operator in operators
        for case in cases_of(operator, metafunc.config)
        if case.name in cases
    ]
    # The scope has a case checked once for all its directions, which are those of all operators of a file.
    metafunc.parametrize("checked", found, indirect=True, scope="module")
    directions = operators[0].directions
    metafunc.parametrize("direction", directions, ids=[direction.replace(" ", "_") for direction in directions])


@pytest.fixture(scope="module")
def checked(request: pytest.FixtureRequest) -> tuple[Operator, Checked]:
    """A case whose providers were all built and checked, once for all directions."""
    operator, case = request.param
    names = chosen_names(request.config, "provider", provider_names())
    providers = {name: provider for name, provider in operator.providers.items() if name in names}
    if not providers:
        pytest.skip(f"{operator.name} has none of the providers chosen")
    return operator, check_providers(case, providers, DEVICE)


@pytest.fixture
def time_operator(
    checked: tuple[Operator, Checked],
    direction: str,
    benchmark: Any,
    drive: Drive,
    keep: Callable[[list[Row]], list[Row]],
    limits: dict[str, Any],
    sizes: str,
) -> Callable[[], None]:
    """Times all providers of a case in one direction, unless one of them was wrong."""

    def run() -> None:
        operator, found = checked
        assert not found.failed, "; ".join(f"{name}: {why}" for name, why in found.failed.items())
        rounds, seconds = ROUNDS[sizes], SECONDS[sizes]
        rows = time_providers(found, direction, rounds=rounds, seconds=seconds, limits=limits, drive=drive)
        benchmark.extra_info |= about(found.case, direction)
        keep(rows)
        # The smaller smoke cases say what a call costs, and not what the work does.
        if DEVICE.type == "cpu" and found.case == operator.smoke[-1]:
            hold_ratios(rows, "auto", operator.written_out)

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What a reader needs to judge a time by, in place of what names a machine and not its kind."""
    measured = config.stash.get(LIMITS, {})
    smoke = config.getoption("--sizes") == "smoke"
    means = results.SMOKE if smoke else results.MEASURED
    for name in ("node", "release", "cpu"):
        machine_info.pop(name, None)
    facts = config.stash.get(FACTS, None) or machine.facts(DEVICE)
    machine_info |= results.head(facts, measured, means) | {"sizes": config.getoption("--sizes")}


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    """Of the commit, what names it; whether files differ is asked for those alone that are measured."""
    kept = {name: commit_info.get(name) for name in ("id", "time")}
    commit_info.clear()
    commit_info |= kept | {"dirty": machine.commit().endswith("-dirty"), "project": "fused-beit"}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if rows:
        terminalreporter.section("providers, timed in turn")
        facts = config.stash.get(FACTS, None) or machine.facts(DEVICE)
        threads, versions = text.threads(facts), facts["versions"]
        terminalreporter.line(f"{text.named(facts)}, {threads}, torch {versions['torch']}, commit {facts['commit']}")
        for line in text.about_kind(facts):
            terminalreporter.line(line)
        if config.getoption("--sizes") == "smoke":
            terminalreporter.line("smoke sizes: these times say only that the benchmarks run")
        for line in table(rows):
            terminalreporter.line(line)
