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

from . import machine, results
from .attention import DIRECTIONS, ON_GPU, REHEARSAL, Case
from .attention_providers import PLANTED, PROVIDERS, Provider
from .attention_rows import check_providers, time_providers
from .attention_targets import verdicts
from .rounds import summary
from .supervised import Journal, supervise

SILENCE = 150
"""Seconds in which a provider must be compiled and checked, or it is given up."""
GRACE = 30
"""Seconds for timing what was checked when the time is up."""
NOT_REACHED = "not reached in the time given"


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Measure all operators on the GPU.")
    parser.add_argument("--output", type=Path, help="folder for <machine>/attention.json (default: benchmarks/results)")
    parser.add_argument("--cases", help="only these, as base,n577")
    parser.add_argument("--providers", help="only these, as triton,sdpa")
    parser.add_argument("--rounds", type=int, help="how often each is timed (default: 30)")
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
    cases = {case.name: case for case in (REHEARSAL if options.rehearse else ON_GPU)}
    case_names = chosen("case", options.cases, cases)
    names = chosen("provider", options.providers, PROVIDERS)
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
    rounds = options.rounds or (1 if options.rehearse else 30)
    return Session(options, [cases[name] for name in case_names], names, rounds).run()


class Session:
    """One run of the command: what is measured, and the document that grows with it."""

    def __init__(self, options: argparse.Namespace, cases: list[Case], providers: list[str], rounds: int) -> None:
        self.options, self.cases, self.providers, self.rounds = options, cases, providers, rounds
        self.begun = time.monotonic()
        self.deadline = self.begun + 60 * options.minutes
        self.scratch = tempfile.TemporaryDirectory()
        self.document: dict[str, Any] = {
            "means": results.NOTHING if options.rehearse else results.MEASURED,
            "finished": False,
            "cases": {},
            "rows": [],
            "failed": [],
        }

    def run(self) -> int:
        found = self.supervise(measure_machine)
        if found.badly or not found.events:
            sys.exit(f"error: measuring the limits of the machine {found.badly}; its own message is above")
        self.document |= found.events[-1]
        facts = self.document["machine"]
        if self.options.rehearse:
            facts |= {"device": "no device: a rehearsal", "gpu": None, "driver": None}
        if self.options.commit:
            facts |= {"commit": self.options.commit, "dirty": None}
        folder = (self.options.output or results.RESULTS) / machine.folder_name(facts["device"])
        for case in self.cases:
            if time.monotonic() < self.deadline:
                self.measure(case)
            else:
                print(f"{case}: {NOT_REACHED}", flush=True)
                self.add(case, self.left_out(case), "")
            self.save(folder)
        self.document["finished"] = True
        self.save(folder)
        print("\n".join(results.as_text(self.document)))
        print(f"\nwritten to {folder}")
        return 1 if self.document["failed"] else 0

    def supervise(self, target: Any, *arguments: Any) -> Any:
        journal = Path(self.scratch.name) / "journal"
        until = self.deadline + GRACE
        return supervise(target, *arguments, self.options.rehearse, journal=journal, silence=SILENCE, until=until)

    def measure(self, case: Case) -> None:
        """Rows of one case; a provider that ends the process is left out of a second try."""
        limits, broken = self.document["limits"], {}
        while True:
            print(f"{case} ...", flush=True)
            found = self.supervise(measure_case, case, self.providers, broken, self.rounds, limits, self.deadline)
            if not found.badly or found.doing in broken or found.doing not in self.providers:
                break
            broken[found.doing] = f"its process {found.badly}"
            print(f"  {found.doing}: {broken[found.doing]}", flush=True)
            if time.monotonic() > self.deadline:
                break
        rows = [row for event in found.events for row in event.get("rows", [])]
        self.add(case, rows, f"its process {found.badly}, at {found.doing or 'its inputs'}" if found.badly else "")

    def left_out(self, case: Case) -> list[dict[str, Any]]:
        """Rows of a case for which there was no time."""
        absent = [{"provider": name, "absent": NOT_REACHED} for name in self.providers]
        return [{"case": case.name, "direction": direction} | row for direction in DIRECTIONS for row in absent]

    def add(self, case: Case, rows: list[dict[str, Any]], badly: str) -> None:
        """A case into the document; `badly` says how it ended, where it did not end well."""
        failures = list(dict.fromkeys(f"{row['provider']}: {row['failed']}" for row in rows if "failed" in row))
        failures += [badly] if badly else []
        self.document["cases"][case.name] = {
            "shape": str(case),
            "bytes": {direction: case.bytes(direction) for direction in DIRECTIONS},
            "flops": {direction: case.flops(direction) for direction in DIRECTIONS},
            "failed": bool(failures),
        }
        self.document["rows"] += rows
        self.document["failed"] += [f"{case.name}, {failure}" for failure in failures]

    def save(self, folder: Path) -> None:
        self.document["targets"] = verdicts(self.document["rows"], rehearsal=self.options.rehearse)
        self.document["seconds"] = time.monotonic() - self.begun
        results.write(self.document, folder, "attention")


def this_device(rehearse: bool) -> torch.device:
    if rehearse:
        torch.set_num_threads(1)
    return torch.device("cpu" if rehearse else "cuda")


def measure_machine(rehearse: bool, journal: Journal) -> None:
    """In a process of its own: what the machine is and can do."""
    device = this_device(rehearse)
    journal.add(machine=machine.facts(device), limits=machine.limits(device))


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
    every: dict[str, Provider] = {**PROVIDERS, **PLANTED}
    providers = {name: every[name] for name in names}

    def why_stop() -> str:
        return NOT_REACHED if time.monotonic() > deadline else ""

    def told(provider: str) -> None:
        journal.add(doing=provider)

    checked = check_providers(case, providers, device, told=told, broken=broken, why_stop=why_stop)
    for direction in DIRECTIONS:
        journal.add(doing=direction)
        rows = time_providers(checked, direction, rounds=rounds, limits=limits)
        about = {"case": case.name, "direction": direction}
        journal.add(rows=[about | {"provider": row.provider} | summary(row) for row in rows])


if __name__ == "__main__":
    sys.exit(main())
