"""All operators measured on this machine's GPU, in one command that needs torch, triton and this folder alone.

    python -m benchmarks.gpu                                 into benchmarks/results/<machine>/
    python -m benchmarks.gpu --rehearse --output FOLDER      the same in Triton's interpreter; its numbers mean nothing

Without an installed fused_beit, from the root of the repository:

    mkdir -p build/types/fused_beit && ln -sfn ../../../kernels build/types/fused_beit/kernels
    PYTHONPATH=build/types python3 -m benchmarks.gpu
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import machine, results, text
from .cases import Case
from .measuring import about, check_providers, time_providers
from .operators import OPERATORS, SUBJECT_OF
from .providers import PLANTED, Provider
from .rounds import summary
from .supervised import Journal, supervise
from .targets import verdicts

SILENCE = 150
"""Seconds in which a provider must be compiled and checked, or it is given up."""
GRACE = 30
"""Seconds for timing what was checked when the time is up."""
NOT_REACHED = "not reached in the time given"
ROUNDS, SECONDS = 30, 5.0
"""How often each provider is timed in a direction, where all of them together take no longer than that."""

# In the order of their importance, as each needs compilers: first what the targets are about.
ORDER = (
    ("rel_pos_attention", "base"),
    ("residual_norm", "base"),
    ("token_loss", "base"),
    ("nearest_code", "dvae"),
    ("nearest_code", "vqkd"),
    ("embed_tokens", "base"),
    ("gather_masked", "base"),
    ("rel_pos_attention", "n577"),
    ("rel_pos_attention", "n1025"),
    ("keep_visible", "base"),
    ("restore_tokens", "base"),
)


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Measure all operators on the GPU.")
    parser.add_argument("--output", type=Path, help="folder for <machine>/*.json (default: benchmarks/results)")
    parser.add_argument("--operators", help="only these, as rel_pos_attention,token_loss")
    parser.add_argument("--cases", help="only these, as base,n577")
    parser.add_argument("--providers", help="only these, as triton,sdpa")
    parser.add_argument("--rounds", type=int, help=f"how often each is timed at most (default: {ROUNDS})")
    parser.add_argument("--minutes", type=float, default=7.5, help="what is not begun by then is left out (7.5)")
    parser.add_argument("--commit", help="the commit, for a copy without its git folder")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes in Triton's interpreter, without a GPU")
    parser.add_argument("--plant", help=f"failures for a rehearsal: {','.join(PLANTED)}")
    return parser.parse_args(arguments)


def chosen(what: str, names: str | None, existing: Mapping[str, Any]) -> list[str]:
    """The names of a comma-separated option; all where it is not given. Ends the run for a name that there is not."""
    if names is None:
        return list(existing)
    for name in names.split(","):
        if name not in existing:
            sys.exit(f"error: there is no {what} {name!r}; there are: {', '.join(existing)}")
    return [name for name in existing if name in names.split(",")]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where all went well, 1 where a result was wrong or a provider of ours did not run."""
    options = read_options(arguments)
    operators = chosen("operator", options.operators, OPERATORS)
    every = [case for name in operators for case in cases_of(name, options.rehearse)]
    case_names = chosen("case", options.cases, dict.fromkeys(case.name for case in every))
    names = chosen("provider", options.providers, {name: 0 for op in operators for name in OPERATORS[op].providers})
    if options.plant and not options.rehearse:
        sys.exit("error: --plant is for --rehearse")
    names += chosen("planted failure", options.plant, PLANTED) if options.plant else []
    if options.rehearse:
        if options.output is None or options.output.resolve().is_relative_to(results.RESULTS):
            sys.exit("error: --rehearse needs --output FOLDER, outside benchmarks/results: its numbers mean nothing")
        os.environ["TRITON_INTERPRET"] = "1"
    elif os.environ.get("TRITON_INTERPRET", "0") != "0":
        sys.exit("error: TRITON_INTERPRET is set, and the interpreter is no GPU; unset it, or use --rehearse")
    elif not torch.cuda.is_available():
        sys.exit("error: torch finds no GPU here; --rehearse --output FOLDER tries the command without one")
    if why := unpublishable(options):
        sys.exit(f"error: {why}")
    rounds = options.rounds or (1 if options.rehearse else ROUNDS)
    cases = sorted((case for case in every if case.name in case_names), key=importance)
    return Session(options, cases, names, rounds).run()


def unpublishable(options: argparse.Namespace) -> str:
    """Why the results of such a run must not replace those that are published; "" where they may."""
    known = machine.commit()
    if options.commit and known != "unknown":
        return f"--commit is for a copy without its git folder, and git says that this is {known}; leave --commit out"
    if options.output and not options.output.resolve().is_relative_to(results.RESULTS):
        return ""
    for name in ("operators", "cases", "providers"):
        if getattr(options, name):
            return f"benchmarks/results keeps whole runs; leave --{name} out, or give --output FOLDER, outside it"
    return ""


def cases_of(operator: str, rehearse: bool) -> tuple[Case, ...]:
    return OPERATORS[operator].rehearsal if rehearse else OPERATORS[operator].on_gpu


def importance(case: Case) -> int:
    key = (case.operator, case.name)
    return ORDER.index(key) if key in ORDER else len(ORDER)


class Session:
    """One run of the command: what is measured, and the document that grows with it."""

    def __init__(self, options: argparse.Namespace, cases: list[Case], providers: list[str], rounds: int) -> None:
        self.options, self.cases, self.providers, self.rounds = options, cases, providers, rounds
        self.begun = time.monotonic()
        self.deadline = self.begun + 60 * options.minutes
        self.scratch = tempfile.TemporaryDirectory()
        self.means = results.NOTHING if options.rehearse else results.MEASURED
        self.info: dict[str, Any] = {}
        self.benchmarks: list[dict[str, Any]] = []
        self.failed: dict[str, list[str]] = {}
        """Subject -> what should have run and did not."""
        self.finished = False

    def run(self) -> int:
        found = self.supervise(measure_machine)
        if found.badly or not found.events:
            sys.exit(f"error: measuring the limits of the machine {found.badly}; its own message is above")
        facts, limits = found.events[-1]["machine"], found.events[-1]["limits"]
        if self.options.rehearse:
            facts |= {"device": "no device: a rehearsal", "gpu": None, "driver": None}
        if self.options.commit:
            facts |= {"commit": self.options.commit, "dirty": None}
        self.info = results.head(facts, limits, self.means)
        folder = (self.options.output or results.RESULTS) / machine.folder_name(facts["device"])
        for case in self.cases:
            if time.monotonic() < self.deadline:
                self.measure(case)
            else:
                print(f"{case}: {NOT_REACHED}", flush=True)
                self.add(case, self.left_out(case), "")
            self.save(folder)
        self.finished = True
        self.save(folder)
        print("\n".join(self.as_text()))
        print(f"\nwritten to {folder}")
        return 1 if any(self.failed.values()) else 0

    def supervise(self, target: Any, *arguments: Any) -> Any:
        journal = Path(self.scratch.name) / "journal"
        until = self.deadline + GRACE
        return supervise(target, *arguments, self.options.rehearse, journal=journal, silence=SILENCE, until=until)

    def measure(self, case: Case) -> None:
        """Rows of one case; a provider that ends the process is left out of a second try."""
        limits, broken = self.info["limits"], {}
        names = [name for name in self.providers if name in OPERATORS[case.operator].providers or name in PLANTED]
        if not names:
            return
        while True:
            print(f"{case} ...", flush=True)
            found = self.supervise(measure_case, case, names, broken, self.rounds, limits, self.deadline)
            if not found.badly or found.doing in broken or found.doing not in names:
                break
            broken[found.doing] = f"its process {found.badly}"
            print(f"  {found.doing}: {broken[found.doing]}", flush=True)
            if time.monotonic() > self.deadline:
                break
        self.add(
            case, found.events, f"its process {found.badly}, at {found.doing or 'its inputs'}" if found.badly else ""
        )

    def left_out(self, case: Case) -> list[dict[str, Any]]:
        """Events of a case for which there was no time."""
        absent = {name: {"absent": NOT_REACHED} for name in OPERATORS[case.operator].providers}
        return [{"direction": direction, "rows": absent, "seconds": []} for direction in case.directions]

    def add(self, case: Case, events: list[dict[str, Any]], badly: str) -> None:
        """A case into the results; `badly` says how it ended, where it did not end well."""
        failures = [badly] if badly else []
        for event in events:
            if "rows" not in event:
                continue
            direction, rows = event["direction"], event["rows"]
            extra_info = about(case, direction) | {"case": f"{case}, {direction}", "providers": rows}
            subject = SUBJECT_OF[case.operator]
            name = f"test_{subject}[{case.operator}-{case.name}-{direction.replace(' ', '_')}]"
            self.benchmarks.append(results.entry(subject, name, extra_info, event["seconds"]))
            failures += [f"{provider}: {row['failed']}" for provider, row in rows.items() if "failed" in row]
        failures = [f"{case.operator} {case.name}, {why}" for why in dict.fromkeys(failures)]
        self.failed.setdefault(SUBJECT_OF[case.operator], []).extend(failures)

    def save(self, folder: Path) -> None:
        """Everything so far, a file for each subject and all of it as text."""
        whole = results.document(self.info, self.benchmarks) | {"finished": self.finished}
        results.write_subjects(whole, folder, self.failed)
        results.write("\n".join(self.as_text()) + "\n", folder / "gpu.txt")

    def as_text(self) -> list[str]:
        """The results for people: machine, limits, a table for each case and direction, targets, failures."""
        whole = results.document(self.info, self.benchmarks)
        lines = [] if self.means == results.MEASURED else [f"THESE NUMBERS MEAN {self.means.upper()}", ""]
        lines += text.machine_lines(self.info)
        seconds = time.monotonic() - self.begun
        lines.append(f"{seconds:.0f} s in all, {'finished' if self.finished else 'NOT FINISHED'}")
        for benchmark in self.benchmarks:
            lines += ["", benchmark["extra_info"]["case"], *text.aligned(text.row_table(benchmark))]
        lines += ["", "targets"]
        rehearsal = self.options.rehearse
        lines += text.aligned(text.target_table(verdicts(results.rows_of(whole), rehearsal=rehearsal)))
        return [*lines, "", *(f"FAILED {failure}" for failures in self.failed.values() for failure in failures)]


def this_device(rehearse: bool) -> torch.device:
    if rehearse:
        torch.set_num_threads(1)
    return torch.device("cpu" if rehearse else "cuda")


def measure_machine(rehearse: bool, journal: Journal) -> None:
    """In a process of its own: what the machine is and can do."""
    device = this_device(rehearse)
    journal.add(machine=machine.facts(device), limits=machine.limits(device, small=rehearse))


def measure_case(
    case: Case,
    names: list[str],
    broken: dict[str, str],
    rounds: int,
    limits: dict[str, float],
    deadline: float,
    rehearse: bool,
    journal: Journal,
) -> None:
    """In a process of its own: rows of one case, direction by direction, into the journal."""
    device = this_device(rehearse)
    every: dict[str, Provider] = {**OPERATORS[case.operator].providers, **PLANTED}
    providers = {name: every[name] for name in names}

    def why_stop() -> str:
        return NOT_REACHED if time.monotonic() > deadline else ""

    def told(provider: str) -> None:
        journal.add(doing=provider)

    checked = check_providers(case, providers, device, told=told, broken=broken, why_stop=why_stop)
    for direction in case.directions:
        journal.add(doing=direction)
        rows = time_providers(checked, direction, rounds=rounds, seconds=SECONDS, limits=limits)
        first = next((row for row in rows if row.seconds), None)
        journal.add(
            direction=direction,
            rows={row.provider: summary(row) for row in rows},
            seconds=first.seconds if first else [],
        )


if __name__ == "__main__":
    sys.exit(main())
