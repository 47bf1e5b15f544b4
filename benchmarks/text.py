"""Results as tables: rows of one benchmark, targets, the machine; as aligned text or as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from . import machine

Table = list[list[str]]
"""A line of names, then a line a row."""

NUMBERS = {
    "ratio": ("over first", lambda value: f"{value:.2f}"),
    "gb_per_s": ("GB/s", lambda value: f"{value:.3g}"),
    "tflop_per_s": ("TFLOP/s", lambda value: f"{value:.3g}"),
    "share_of_limit": ("of the limit", lambda value: f"{value:.1%}"),
    "gflop_per_s": ("GFLOP/s", lambda value: f"{value:.4g}"),
    "pictures_per_s": ("pictures/s", lambda value: f"{value:.4g}"),
    "mfu": ("MFU", lambda value: f"{value:.1%}"),
    "host_s": ("host ms", lambda value: f"{1e3 * value:.4g}"),
    "device_s": ("device ms", lambda value: f"{1e3 * value:.4g}"),
    "num_kernels": ("kernels", lambda value: f"{value:d}"),
    "peak_bytes": ("peak MB", lambda value: f"{value / 1e6:.1f}"),
    "state_bytes": ("state MB", lambda value: f"{value / 1e6:.1f}"),
    "extra_bytes": ("extra MB", lambda value: f"{value / 1e6:.1f}"),
}
"""Of a row, what has a column of its own where some row of the table has it; so has any other number that it has."""
WITHOUT_COLUMN = ("median", "q1", "q3", "rounds", "floor_s", "checked_pictures", "waits_for_host")
ABOUT = ("case", "providers", "operator", "name", "direction", "shape", "dtype", "bytes", "flops")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def facts_line(benchmark: Mapping[str, Any]) -> str:
    """What a benchmark says of all its rows, as "GFLOP 432, pictures/s 2.3"; empty where it says nothing."""
    extra = benchmark["extra_info"]
    return ", ".join(f"{key} {value:.4g}" for key, value in extra.items() if key not in ABOUT and is_number(value))


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.4g}"


def row_table(benchmark: Mapping[str, Any]) -> Table:
    """Providers that have a time. `*` marks a time that holds waits for the host, (bound) what does other work."""
    rows = {name: row for name, row in benchmark["extra_info"]["providers"].items() if "median" in row}
    others = {key for row in rows.values() for key, value in row.items() if is_number(value)} - {*WITHOUT_COLUMN}
    columns = NUMBERS | {key: (key, "{:.4g}".format) for key in sorted(others - NUMBERS.keys())}
    shown = [key for key in columns if any(row.get(key) is not None for row in rows.values())]
    table = [["provider", "median ms", "quartiles", *(columns[key][0] for key in shown)]]
    has_errors = any(row.get("errors") for row in rows.values())
    table[0] += ["error"] if has_errors else []
    for name, row in rows.items():
        label = f"{name} (bound)" if row.get("kind") == "bound" else name
        median = milliseconds(row["median"]) + ("*" if row.get("waits_for_host") else "")
        numbers = ["" if row.get(key) is None else columns[key][1](row[key]) for key in shown]
        error = [f"{max(row['errors'].values()):.1e}" if row.get("errors") else ""] if has_errors else []
        table.append([label, median, f"{milliseconds(row['q1'])} to {milliseconds(row['q3'])}", *numbers, *error])
    return table if rows else []


def without_a_time(benchmarks: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each reason why there is no time: providers, and where it is not so everywhere, the cases."""
    found: dict[str, dict[str, list[str]]] = {}
    for benchmark in benchmarks:
        for name, row in benchmark["extra_info"]["providers"].items():
            if "median" not in row:
                why = f"FAILED: {row['failed']}" if "failed" in row else row["absent"]
                found.setdefault(why, {}).setdefault(name, []).append(benchmark["extra_info"]["case"])
    everywhere = len(benchmarks)
    lines = []
    for why, names in found.items():
        said = [name if len(cases) == everywhere else f"{name} ({'; '.join(cases)})" for name, cases in names.items()]
        lines.append(f"{'; '.join(said)}: {why}")
    return lines


def target_table(verdicts: Sequence[Mapping[str, Any]]) -> Table:
    """A `*` marks targets that `target_notes` has a word on."""
    table = [["target on an H100 or H200", "wanted", "measured", ""]]
    for target in verdicts:
        value = "" if target["value"] is None else f"{target['value']:.4g} {target['unit']}"
        name = target["target"] + ("*" if "note" in target else "")
        table.append([name, target["wanted"], value, target["verdict"]])
    return table


def target_notes(verdicts: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each note, to stand under the table."""
    return [f"* {note}" for note in dict.fromkeys(target["note"] for target in verdicts if "note" in target)]


def machine_lines(info: Mapping[str, Any]) -> list[str]:
    """The machine, what it ran, and what it can do."""
    versions = ", ".join(f"{name} {version}" for name, version in info["versions"].items())
    driver = f", driver {info['driver']}" if info["driver"] else ""
    limits = info["limits"]
    rates = ", ".join(f"{rate / 1e12:.4g} TFLOP/s in {dtype}" for dtype, rate in limits["flops_per_s_in"].items())
    return [
        f"{named(info)}{driver}, {threads(info)}, Python {info['python']}, {versions}",
        *about_kind(info),
        load(info),
        f"commit {info['commit']}, kernels {info['sources']}",
        f"limits measured: {limits['bytes_per_s'] / 1e9:.4g} GB/s, {rates}; an empty run "
        f"{1e6 * limits['empty_run_s']:.1f} us",
    ]


def named(info: Mapping[str, Any]) -> str:
    """The device; a processor with its kind."""
    return ", ".join(filter(None, (info["device"], machine.kind(info))))


def about_kind(info: Mapping[str, Any]) -> list[str]:
    """A line on how a processor was imitated, where it was."""
    return [f"{info['instruction_set']} {info['imitated']}"] if info.get("imitated") else []


def threads(info: Mapping[str, Any]) -> str:
    return f"{info['threads']} thread{'' if info['threads'] == 1 else 's'}"


def load(info: Mapping[str, Any]) -> str:
    return f"load when it began: {info['load']:.1f} on {info['cores']} cores"


def aligned(table: Table) -> list[str]:
    """For a terminal."""
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))] if table else []
    return [
        "  " + " ".join(f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(line)) for line in table
    ]


def markdown(table: Table) -> list[str]:
    """For a page."""
    if not table:
        return []
    first, *rest = table
    rule = ["---", *(["--:"] * (len(first) - 1))]
    return [f"| {' | '.join(line)} |" for line in (first, rule, *rest)]
