"""Results of one machine as JSON files, one a subject, in pytest-benchmark's format with what it does not know of.

`pytest-benchmark compare FILES` reads them, and `benchmarks.publish` makes the pages from them. Beside that format:

    machine_info   the facts of `machine`, its measured `limits`, `format` and `means`
    extra_info     of each benchmark: `case`, `providers` with a row each, and for operators what `measuring.about` says
    failed         what should have run and did not
    finished       whether the run came to its end
"""

import json
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
FORMAT = 1
"""Raised whenever older files would be misread."""
MEASURED = "measured"
NOTHING = "nothing: a rehearsal with tiny shapes on a processor"
SMOKE = "nothing: smoke sizes, which only show that the benchmarks run"

Document = dict[str, Any]


def head(facts: Mapping[str, Any], limits: Mapping[str, Any], means: str) -> dict[str, Any]:
    """What `machine_info` holds of ours."""
    return {**facts, "limits": dict(limits), "means": means, "format": FORMAT}


def document(machine_info: dict[str, Any], benchmarks: Sequence[dict[str, Any]]) -> Document:
    """The same document as pytest-benchmark's, where that is not installed."""
    commit = machine_info["commit"]
    return {
        "machine_info": machine_info,
        "commit_info": {"id": commit, "dirty": machine_info["dirty"], "project": "fused-beit"},
        "benchmarks": list(benchmarks),
        "datetime": datetime.now(UTC).isoformat(),
        "version": f"fused-beit format {FORMAT}",
    }


def entry(subject: str, name: str, extra_info: dict[str, Any], seconds: Sequence[float]) -> dict[str, Any]:
    """One benchmark as pytest-benchmark would write it; `seconds` are those of the first provider."""
    param = name.partition("[")[2].removesuffix("]") or None
    made = {
        "group": None,
        "name": name,
        "fullname": f"benchmarks/bench_{subject}.py::{name}",
        "params": None,
        "param": param,
        "extra_info": extra_info,
        "options": {},
    }
    if seconds:
        several = len(seconds) > 1
        q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive") if several else [seconds[0]] * 3
        mean = statistics.mean(seconds)
        spread = statistics.stdev(seconds) if several else 0.0
        low, high = q1 - 1.5 * (q3 - q1), q3 + 1.5 * (q3 - q1)
        outside = sum(not low <= value <= high for value in seconds)
        far = sum(abs(value - mean) > spread for value in seconds)
        made["stats"] = {
            "min": min(seconds),
            "max": max(seconds),
            "mean": mean,
            "stddev": spread,
            "rounds": len(seconds),
            "median": median,
            "iqr": q3 - q1,
            "q1": q1,
            "q3": q3,
            "iqr_outliers": outside,
            "stddev_outliers": far,
            "outliers": f"{far};{outside}",
            "ld15iqr": min(value for value in seconds if value >= low),
            "hd15iqr": max(value for value in seconds if value <= high),
            "ops": 1 / mean,
            "total": sum(seconds),
            "data": list(seconds),
            "iterations": 1,
        }
    return made


def subject_of(benchmark: Mapping[str, Any]) -> str:
    """Of a benchmark in benchmarks/bench_<subject>.py."""
    return Path(benchmark["fullname"].partition("::")[0]).stem.removeprefix("bench_")


def write_subjects(whole: Document, folder: Path, failed: Mapping[str, Sequence[str]] | None = None) -> list[Path]:
    """A file for each subject of a document, with what failed of it."""
    subjects: dict[str, list[dict[str, Any]]] = {}
    for benchmark in whole["benchmarks"]:
        # Of what pytest gave a benchmark it writes how Python shows it, addresses and all; `param` names it.
        subjects.setdefault(subject_of(benchmark), []).append({**benchmark, "params": None})
    paths = []
    for subject, benchmarks in subjects.items():
        paths.append(folder / f"{subject}.json")
        about = {"benchmarks": benchmarks, "failed": list((failed or {}).get(subject, []))}
        write(json.dumps(whole | about, indent=1) + "\n", paths[-1])
    return paths


def write(text: str, path: Path) -> None:
    """A reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


def load(path: Path) -> Document:
    """The one way to read results that are to be published. Raises ValueError, in a sentence, for what is none."""
    try:
        found = json.loads(path.read_text())
    except ValueError:
        raise ValueError(f"{path}: this is no JSON; delete it or measure again") from None
    info = found.get("machine_info", {}) if isinstance(found, dict) else {}
    if info.get("format") != FORMAT:
        raise ValueError(
            f"{path}: results of format {info.get('format')}, and this version reads format {FORMAT}; measure again"
        )
    if info["means"] != MEASURED:
        raise ValueError(f"{path}: these numbers are not for publishing; they mean {info['means']}")
    if info["commit"] == "unknown" or info["dirty"]:
        raise ValueError(
            f"{path}: results of commit {info['commit']}, which does not say what was measured; commit, then measure "
            "again"
        )
    if not found.get("finished", True):
        raise ValueError(f"{path}: the run that wrote this did not come to its end; measure again")
    return found


def rows_of(found: Document) -> Iterator[dict[str, Any]]:
    """Every row of a document with its `case`, `provider` and, for operators, `operator`, `name`, `direction`.

    Each has the machine's rate of a large copy too, `copy_gb_per_s`.
    """
    limit = {"copy_gb_per_s": found["machine_info"]["limits"]["bytes_per_s"] / 1e9}
    for benchmark in found["benchmarks"]:
        extra = benchmark["extra_info"]
        about = limit | {key: extra[key] for key in ("case", "operator", "name", "direction") if key in extra}
        for provider, row in extra.get("providers", {}).items():
            yield about | {"provider": provider} | row
