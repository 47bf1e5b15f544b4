"""What the compiler makes of the pinned kernels: a table in the folder of each operator, RESOURCES.md. Needs no GPU.

python -m fused_beit.kernels.report           compile everything and write the tables
python -m fused_beit.kernels.report --check   compile and compare with the tables; 1 where they differ

--only "sm_90 N=197 D=64" ...   only these rows of the tables, with --check
--json                          what was compiled goes to stdout, an object for each row
"""

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ._triton.target import interpreted

if TYPE_CHECKING:
    from ._triton.ahead_of_time import Case, Resources

KERNELS = Path(__file__).parent

HEAD = """\
# What the compiler makes of the kernels

Compiled ahead of time in bf16 by Triton {version}; nothing here was run. Written by `make kernel-report`.

- build: the variant that was compiled, as `report_cases.py` says; a kernel that several variants share is listed once
- registers, stack (bytes): of a thread. A stack is registers kept in memory; spills are its loads and stores
  (on AMD the registers kept there)
- shared: KiB of a program; tensor: columns of the tensor memory that sm_100 has
- wgmma, mma, TMA, atomics: instructions in the code, not as often as they run. wgmma: those of tensor memory on sm_100;
  mma: MFMA on AMD; atomics: additions of floating-point numbers
- fit: as many programs as a multiprocessor holds at once, by registers, warps, shared and tensor memory; for AMD not
  estimated

| arch | shape | kernel | build | warps | regs | stack | shared | tensor | wgmma | mma | TMA | spill | atomics | fit |
|---|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|
"""


class Row(NamedTuple):
    """One kernel of one case."""

    case: "Case"
    resources: "Resources"

    def markdown(self) -> str:
        arch, shape, build, _ = self.case
        kernel, warps, registers, stack, shared, *counts, programs, _ = self.resources
        cells = (arch, shape, kernel, build, warps, registers, stack, f"{shared / 1024:.1f}", *counts, programs or "-")
        return f"| {' | '.join(map(str, cells))} |"

    def json(self) -> dict[str, Any]:
        arch, shape, build, _ = self.case
        return {"arch": arch, "shape": shape, "build": build, **self.resources._asdict()}

    def broken_rules(self) -> list[str]:
        """What must hold of any kernel, whatever the version of Triton."""
        from ._triton.ahead_of_time import SHARED_LIMIT, TENSOR_MEMORY_LIMIT

        arch, limit = self.case.arch, SHARED_LIMIT[self.case.arch]
        broken = []
        if self.resources.shared > limit * 1024:
            broken.append(f"more than the {limit} KiB of shared memory that a program can have")
        if self.resources.tensor_memory > TENSOR_MEMORY_LIMIT:
            broken.append(f"more than the {TENSOR_MEMORY_LIMIT} columns of tensor memory that there are")
        if self.resources.trapped:
            broken.append("it does nothing but stop")
        if arch == "sm_90" and self.resources.stack:
            broken.append("registers in memory")
        if arch == "sm_90" and self.resources.mma and not self.resources.wgmma:
            broken.append("none of the tensor core instructions of its architecture")
        if self.case.build == "in order" and self.resources.atomics:
            broken.append("atomics in a build whose sums have an order")
        return broken


def all_cases() -> dict[str, list["Case"]]:
    """Folder of an operator -> what to compile of it: the `cases()` of its report_cases.py."""
    folders = sorted(path.parent.name for path in KERNELS.glob("*/report_cases.py"))
    modules = {folder: importlib.import_module(f".{folder}.report_cases", __package__) for folder in folders}
    return {folder: list(module.cases()) for folder, module in modules.items()}


def compile_rows(cases: list["Case"]) -> list[Row]:
    """The kernels of all cases, in order, compiled by as many processes as there are cores."""
    from ._triton.ahead_of_time import compile_case

    num_processes = min(len(os.sched_getaffinity(0)), len(cases))
    with ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn")) as pool:
        compiled = list(pool.map(compile_case, cases))
    rows: list[Row] = []
    seen = set()
    for case, kernels in zip(cases, compiled, strict=True):
        for resources in kernels:
            if (case.arch, case.shape, resources) not in seen:
                seen.add((case.arch, case.shape, resources))
                rows.append(Row(case, resources))
    return rows


def table(version: str, rows: list[Row]) -> str:
    return HEAD.format(version=version) + "".join(row.markdown() + "\n" for row in rows)


def differences(text: str, compiled: list[str], only: list[str] | None = None) -> list[str]:
    """Lines of a table, or only some, that are not so any more (-), and what they are (+)."""
    kept = [line for line in text.splitlines() if line.startswith(("| sm_", "| gfx"))]
    if only:
        kept = [line for line in kept if line.startswith(tuple(f"| {row.replace(' ', ' | ', 1)} |" for row in only))]
    gone = [f"- {line}" for line in kept if line not in compiled]
    return gone + [f"+ {line}" for line in compiled if line not in kept]


def main() -> int:
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser("python -m fused_beit.kernels.report", description=description)
    parser.add_argument("--check", action="store_true", help="compare with the tables instead of writing them")
    parser.add_argument("--only", nargs="+", metavar="ROW", help='only these, like "sm_90 N=197 D=64"; with --check')
    parser.add_argument("--json", action="store_true", help="write what was compiled to stdout")
    arguments = parser.parse_args()
    if arguments.only and not arguments.check:
        parser.error("--only goes with --check: a table is written whole")
    if importlib.util.find_spec("triton") is None:
        parser.error("triton is not installed")
    if interpreted():
        parser.error("Triton's interpreter compiles nothing; unset TRITON_INTERPRET")
    import triton

    failed = False
    for folder, cases in all_cases().items():
        cases = [case for case in cases if not arguments.only or f"{case.arch} {case.shape}" in arguments.only]
        if not cases:
            continue
        start = time.monotonic()
        rows = compile_rows(cases)
        path = KERNELS / folder / "RESOURCES.md"
        say(f"{folder}: compiled {len(rows)} kernels in {time.monotonic() - start:.0f} s")
        if arguments.json:
            print("\n".join(json.dumps(row.json()) for row in rows))
        if not arguments.check:
            path.write_text(table(triton.__version__, rows))
        elif (found := written_by(path)) != triton.__version__:
            say(f"{path.name} is of Triton {found}, and this is {triton.__version__}: only the rules were checked")
        elif changed := differences(path.read_text(), [row.markdown() for row in rows], arguments.only):
            failed = True
            say(f"{path.name} is out of date; `make kernel-report` writes it:", *changed)
        for row in rows:
            for rule in row.broken_rules():
                failed = True
                say(f"{rule}: {row.markdown()}")
    return int(failed)


def written_by(path: Path) -> str | None:
    """Version of Triton that a table is of."""
    match = re.search(r"by Triton ([\w.+]+);", path.read_text()) if path.exists() else None
    return match and match[1]


def say(*lines: str) -> None:
    print(*lines, sep="\n", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
