"""All operators and the training step measured on this machine's GPU, in one command.

The operators need torch, triton and this folder alone. The step needs the engine, with deepspeed and pydantic, and is
compared with timm and transformers where there are; docs/benchmarks.md names the wheels.

    python -m benchmarks.gpu                                 into benchmarks/results/<machine>/
    python -m benchmarks.gpu --rehearse --output FOLDER      the same in Triton's interpreter; its numbers mean nothing

Without an installed fused_beit, from the root of the repository:

    mkdir -p build/types/fused_beit
    for part in kernels engine ds_configs; do ln -sfn ../../../$part build/types/fused_beit/$part; done
    PYTHONPATH=build/types python3 -m benchmarks.gpu
"""

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fused_beit.kernels._triton.target import why_not_interpreted

from . import machine, results, step_names, text
from .operators import OPERATORS
from .parts import LIMITS, MINUTES, NOT_REACHED, Part, Request, every_part, measure_machine, time_is_up
from .providers import PLANTED
from .supervised import OUT_OF_TIME, Ended, Event, supervise
from .targets import verdicts

SILENCE = 150
"""Seconds in which a provider must be compiled and checked, or it is given up."""
GRACE = 30
"""Seconds for timing what was checked when the time is up."""
ROUNDS = 30
"""How often each provider is timed in a direction, where all of them together take no longer than `parts.SECONDS`."""


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Measure all operators and the training step on the GPU."
    )
    parser.add_argument("--output", type=Path, help="folder for <machine>/*.json (default: benchmarks/results)")
    parser.add_argument("--operators", help="only these, as rel_pos_attention,train_step")
    parser.add_argument("--cases", help="only these, as base,base-bf16")
    parser.add_argument("--providers", help='only these, as "triton,timm,transformers, sdpa"')
    parser.add_argument("--rounds", type=int, help=f"how often each is timed at most (default: {ROUNDS})")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help=f"what is not begun by then is left out ({MINUTES:g})"
    )
    parser.add_argument("--commit", help="the commit, for a copy without its git folder")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes in Triton's interpreter, without a GPU")
    parser.add_argument("--plant", help=f"failures for a rehearsal: {','.join(PLANTED)}")
    return parser.parse_args(arguments)


def chosen(what: str, names: str | None, existing: Mapping[str, Any]) -> list[str]:
    """The names of an option; all where it is not given. Ends the run for a name that there is not.

    A comma separates them, but not before a blank: then it is part of a name, as in "transformers, sdpa".
    """
    if names is None:
        return list(existing)
    asked = re.split(r",(?! )", names)
    for name in asked:
        if name not in existing:
            sys.exit(f"error: there is no {what} {name!r}; there are: {'; '.join(existing)}")
    return [name for name in existing if name in asked]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where all went well, 1 where a result was wrong or a provider of ours did not run.

    A peer's step that failed is named among the failures and does not count.
    """
    options = read_options(arguments)
    operators = chosen("operator", options.operators, dict.fromkeys((*OPERATORS, step_names.SUBJECT)))
    parts = [part for part in every_part(rehearse=options.rehearse) if part.operator in operators]
    named = sorted(parts, key=lambda part: operators.index(part.operator))
    cases = chosen("case", options.cases, dict.fromkeys(part.case for part in named))
    names = chosen("provider", options.providers, dict.fromkeys(name for part in named for name in part.providers))
    if options.plant and not options.rehearse:
        sys.exit("error: --plant is for --rehearse")
    names += chosen("planted failure", options.plant, PLANTED) if options.plant else []
    if options.rehearse:
        if options.output is None or options.output.resolve().is_relative_to(results.RESULTS):
            sys.exit("error: --rehearse needs --output FOLDER, outside benchmarks/results: its numbers mean nothing")
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        if why := why_not_interpreted():
            sys.exit(f"error: {why}")
    elif os.environ.get("TRITON_INTERPRET", "0") != "0":
        sys.exit("error: TRITON_INTERPRET is set, and the interpreter is no GPU; unset it, or use --rehearse")
    elif not torch.cuda.is_available():
        sys.exit("error: torch finds no GPU here; --rehearse --output FOLDER tries the command without one")
    if why := unpublishable(options):
        sys.exit(f"error: {why}")
    rounds = options.rounds or (1 if options.rehearse else ROUNDS)
    return Session(options, [part for part in parts if part.case in cases], names, rounds).run()


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


class Session:
    """One run of the command: what is measured, and the document that grows with it."""

    def __init__(self, options: argparse.Namespace, parts: list[Part], providers: list[str], rounds: int) -> None:
        self.options, self.providers, self.rounds = options, providers, rounds
        self.parts = [part for part in parts if self.names_of(part)]
        self.begun = time.monotonic()
        self.deadline = self.begun + 60 * options.minutes
        self.scratch = tempfile.TemporaryDirectory()
        self.means = results.NOTHING if options.rehearse else results.MEASURED
        self.info: dict[str, Any] = {}
        self.benchmarks: list[dict[str, Any]] = []
        self.failed: dict[str, list[str]] = {}
        """Subject -> what should have run and did not."""
        self.status = 0
        self.took: list[tuple[str, int, float]] = []
        """Part, the seconds that it is given, those that it took."""
        self.no_step = ""
        """Why the step cannot be measured here, where that was found."""
        self.finished = False

    def run(self) -> int:
        found = self.supervise(measure_machine, self.options.rehearse)
        if found.badly or not found.events:
            sys.exit(f"error: measuring the limits of the machine {found.badly}; its own message is above")
        facts, limits = found.events[-1]["machine"], found.events[-1]["limits"]
        if self.options.rehearse:
            facts |= {"device": "no device: a rehearsal", "gpu": None, "driver": None}
        if self.options.commit:
            facts |= {"commit": self.options.commit, "dirty": None}
        self.info = results.head(facts, limits, self.means)
        self.took.append(("limits of the machine", LIMITS, time.monotonic() - self.begun))
        folder = (self.options.output or results.RESULTS) / machine.folder_name(facts)
        for part, end in zip(self.parts, time_is_up(self.parts, self.begun, 60 * self.options.minutes), strict=True):
            began = time.monotonic()
            if part.subject == step_names.SUBJECT and self.no_step:
                self.add(part, part.without_times(self.names_of(part), self.no_step))
            elif began < self.deadline:
                # What earlier parts took too much of is missing to the last ones.
                self.measure(part, min(self.deadline, max(end, began + part.seconds)))
            else:
                print(f"{part.title}: {NOT_REACHED}", flush=True)
                self.add(part, part.without_times(self.names_of(part), NOT_REACHED))
            self.took.append((part.label, part.seconds, time.monotonic() - began))
            self.save(folder)
        self.finished = True
        self.save(folder)
        print("\n".join(self.as_text()))
        print(f"\nwritten to {folder}")
        return self.status

    def names_of(self, part: Part) -> tuple[str, ...]:
        """The part's providers that were chosen, with the planted failures; () where none of its own was."""
        if not set(self.providers) & set(part.providers):
            return ()
        return tuple(name for name in self.providers if name in part.providers or name in PLANTED)

    def supervise(self, target: Callable[..., None], *arguments: Any) -> Ended:
        journal = Path(self.scratch.name) / "journal"
        return supervise(target, *arguments, journal=journal, silence=SILENCE, until=self.deadline + GRACE)

    def measure(self, part: Part, until: float) -> None:
        """Rows of one part; a provider that ends the process is left out of a second try."""
        names, broken = self.names_of(part), dict[str, str]()
        until = self.deadline if self.options.rehearse else until
        while True:
            print(f"{part.title} ...", flush=True)
            request = Request(names, broken, self.rounds, self.info["limits"], until, self.options.rehearse)
            found = self.supervise(part.measure, request)
            if not found.badly or found.doing in broken or found.doing not in names:
                break
            broken[found.doing] = f"its process {found.badly}"
            print(f"  {found.doing}: {broken[found.doing]}", flush=True)
            if time.monotonic() > self.deadline:
                break
        badly = f"its process {found.badly}, at {found.doing or 'its inputs'}" if found.badly else ""
        events = found.events
        if why := next((event["absent"] for event in events if "absent" in event), ""):
            print(f"  {why}", flush=True)
            self.no_step = why
            events = part.without_times(names, why)
        elif found.badly == OUT_OF_TIME and not any("rows" in event for event in events):
            events, badly = part.without_times(names, badly), ""
        self.add(part, events, badly)

    def add(self, part: Part, events: list[Event], badly: str = "") -> None:
        """A part into the results; `badly` says how it ended, where it did not end well."""
        failures = [badly] if badly else []
        for event in events:
            if "rows" not in event:
                continue
            direction, rows = event["direction"], event["rows"]
            extra_info = event.get("about", part.about[direction]) | {"providers": rows}
            name = "-".join([*part.key[:2], direction.replace(" ", "_")])
            entry = results.entry(part.subject, f"test_{part.subject}[{name}]", extra_info, event["seconds"])
            self.benchmarks.append(entry)
            wrong = {provider: row["failed"] for provider, row in rows.items() if "failed" in row}
            failures += [f"{provider}: {why}" for provider, why in wrong.items()]
            self.status |= not wrong.keys() <= {*step_names.PEERS}
        self.status |= bool(badly)
        failures = [f"{part.label}, {why}" for why in dict.fromkeys(failures)]
        self.failed.setdefault(part.subject, []).extend(failures)

    def save(self, folder: Path) -> None:
        """Everything so far, a file for each subject and all of it as text."""
        whole = results.document(self.info, self.benchmarks) | {"finished": self.finished}
        results.write_subjects(whole, folder, self.failed)
        results.write("\n".join(self.as_text()) + "\n", folder / "gpu.txt")

    def as_text(self) -> list[str]:
        """The results for people: machine, limits, a table for each case and direction, targets, time, failures."""
        whole = results.document(self.info, self.benchmarks)
        lines = [] if self.means == results.MEASURED else [f"THESE NUMBERS MEAN {self.means.upper()}", ""]
        lines += text.machine_lines(self.info)
        seconds = time.monotonic() - self.begun
        lines.append(f"{seconds:.0f} s in all, {'finished' if self.finished else 'NOT FINISHED'}")
        for benchmark in self.benchmarks:
            lines += ["", benchmark["extra_info"]["case"], *text.aligned(text.row_table(benchmark))]
            lines += [f"  without a time: {line}" for line in text.without_a_time([benchmark])]
        lines += ["", "targets"]
        said = verdicts(results.rows_of(whole), rehearsal=self.options.rehearse)
        lines += [*text.aligned(text.target_table(said)), *text.target_notes(said)]
        lines += ["", *self.time_table()]
        return [*lines, "", *(f"FAILED {failure}" for failures in self.failed.values() for failure in failures)]

    def time_table(self) -> list[str]:
        """What each part is given of the whole plan on a GPU, and what it took here."""
        table = [["part", "given s", "took s"], *([label, str(given), f"{s:.0f}"] for label, given, s in self.took)]
        return [f"time: the whole plan is given {60 * MINUTES:.0f} s on a GPU", *text.aligned(table)]


if __name__ == "__main__":
    sys.exit(main())
