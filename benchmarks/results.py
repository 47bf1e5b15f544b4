"""Results of one machine as a JSON file with all that a reader needs, and the same as text."""

import json
import os
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
NOTHING = "nothing: a rehearsal with tiny shapes on a processor"
MEASURED = "measured"


def write(document: dict[str, Any], folder: Path, name: str) -> None:
    """`name`.json and `name`.txt; a reader never sees half of either."""
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in {
        folder / f"{name}.json": json.dumps(document, indent=1) + "\n",
        folder / f"{name}.txt": "\n".join(as_text(document)) + "\n",
    }.items():
        part = path.with_name(f"{path.name}.part")
        part.write_text(text)
        os.replace(part, path)


def load(path: Path) -> dict[str, Any]:
    """The one way to read results that are to be published. Raises ValueError for those that mean nothing."""
    document = json.loads(path.read_text())
    if (means := document.get("means")) != MEASURED:
        raise ValueError(f"{path}: these numbers are not for publishing; they mean {means}")
    return document


def as_text(document: dict[str, Any]) -> list[str]:
    """The results for people: machine, limits, a table for each case and direction, targets."""
    machine, limits = document["machine"], document["limits"]
    lines = [] if document["means"] == MEASURED else [f"THESE NUMBERS MEAN {document['means'].upper()}", ""]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines += [
        f"{machine['device']}, driver {machine['driver']}, {versions}",
        f"commit {machine['commit']}, kernels {machine['sources']}",
        f"limits measured: {limits['bytes_per_s'] / 1e12:.3g} TB/s, {limits['flops_per_s'] / 1e12:.4g} TFLOP/s; "
        f"an empty run {1e6 * limits['empty_run_s']:.1f} us",
        f"{document['seconds']:.0f} s in all, {'finished' if document['finished'] else 'NOT FINISHED'}",
    ]
    for case, about in document["cases"].items():
        for direction in dict.fromkeys(row["direction"] for row in document["rows"] if row["case"] == case):
            rows = [row for row in document["rows"] if (row["case"], row["direction"]) == (case, direction)]
            lines += ["", f"{about['shape']}, {direction}", *case_table(rows)]
    lines += ["", "targets"]
    for target in document["targets"]:
        value = "" if target["value"] is None else f"{target['value']:.4g} {target['unit']}"
        lines.append(f"  {target['verdict']:13} {target['target']:56} {value:>10}  wanted {target['wanted']}")
    lines += ["", *(f"FAILED {failure}" for failure in document["failed"])]
    return lines


COLUMNS = {"us": 9, "quartiles": 19, "over ours": 9, "GB/s": 6, "TFLOP/s": 7, "limit": 6, "extra MB": 8}


def case_table(rows: list[dict[str, Any]]) -> list[str]:
    """One line a provider; `*` where its time holds waits for the host."""
    lines = [f"  {'provider':22} " + " ".join(f"{name:>{width}}" for name, width in COLUMNS.items())]
    for row in rows:
        if "median" not in row:
            why = f"FAILED: {row['failed']}" if "failed" in row else row["absent"]
            lines.append(f"  {row['provider']:22} {why}")
            continue
        q1, median, q3 = (1e6 * row[key] for key in ("q1", "median", "q3"))
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        extra = f"{row['extra_bytes'] / 1e6:.1f}" if "extra_bytes" in row else ""
        mark = "*" if row["waits_for_host"] else ""
        note = "" if row["kind"] != "bound" else "  a bound"
        lines.append(
            f"  {row['provider']:22} {f'{median:.1f}{mark}':>9} {f'{q1:.1f} to {q3:.1f}':>19} {ratio:>9} "
            f"{row['gb_per_s']:6.0f} {row['tflop_per_s']:7.1f} {row['share_of_limit']:6.1%} {extra:>8}{note}"
        )
    return lines
