"""From results to pages: RESULTS.md, the tables of the README and the plots, all made and never typed.

python -m benchmarks.publish            writes them
python -m benchmarks.publish --check    names those that are not what the results give, and ends with 1
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import plots, results, text
from .cases import BOTH, FORWARD
from .operators import OPERATORS, SUBJECTS
from .providers import CANDIDATE, PEER
from .results import Document
from .targets import verdicts

ROOT = Path(__file__).parent.parent
FOLDER = "benchmarks/results"
BEGIN, END = "<!-- made by `make results`: begin -->", "<!-- made by `make results`: end -->"
INTRODUCTION = """# Results

Made by `make results` from the files in [results/](results/); do not edit. How each number comes about and what the
columns mean stands in [docs/benchmarks.md](../docs/benchmarks.md). Times of two machines or of two runs are not to be
compared; each ratio is of one run, in which all providers took turns.
"""


class Machine:
    """All results of one machine, or those of one of its runs."""

    def __init__(self, folder: Path, found: Mapping[str, Document]) -> None:
        self.folder = folder
        order = [name for name in SUBJECTS if name in found]
        self.subjects: dict[str, Document] = {name: found[name] for name in order + sorted(found.keys() - {*order})}

    def runs(self) -> list["Machine"]:
        """Subjects apart that were measured with other versions, under another load or beside other limits."""
        found: dict[tuple[str, ...], dict[str, Document]] = {}
        for name, one in self.subjects.items():
            found.setdefault(tuple(text.machine_lines(one["machine_info"])), {})[name] = one
        return [Machine(self.folder, subjects) for subjects in found.values()]

    @property
    def info(self) -> dict[str, Any]:
        return next(iter(self.subjects.values()))["machine_info"]

    def works(self) -> Iterator[dict[str, Any]]:
        """Each case of an operator once: forward and backward where it has both."""
        for found in self.subjects.values():
            for benchmark in found["benchmarks"]:
                extra = benchmark["extra_info"]
                if extra.get("operator") in OPERATORS and ours_of(extra["providers"]):
                    whole = BOTH if BOTH in OPERATORS[extra["operator"]].directions else FORWARD
                    if extra["direction"] == whole:
                        yield extra

    def others(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """Subjects that are no operators, such as the step, with those of their benchmarks that have a time."""
        for name, found in self.subjects.items():
            timed = [one for one in found["benchmarks"] if "providers" in one["extra_info"] and text.row_table(one)]
            if name not in SUBJECTS and timed:
                yield name, timed


def ours_of(providers: Mapping[str, dict[str, Any]]) -> str:
    """Which provider is ours: the kernels where they have a time, else what runs where nothing is asked for."""
    return next((name for name in ("triton", "auto") if "median" in providers.get(name, {})), "")


def fastest_other(providers: Mapping[str, dict[str, Any]]) -> str:
    """The fastest exact provider that is not ours, nor what `auto` became; "" where there is none."""
    same = providers[ours_of(providers)].get("plan", "").partition(":")[0]
    peers = {name: row for name, row in providers.items() if row.get("kind") == PEER and name != same}
    times = {name: row["median"] for name, row in peers.items() if "median" in row}
    return min(times, key=lambda name: times[name], default="")


def read_machines(folder: Path) -> list[Machine]:
    """Raises ValueError for files that must not be published."""
    return [
        Machine(found, {path.stem: results.load(path) for path in sorted(found.glob("*.json"))})
        for found in sorted({path.parent for path in folder.glob("*/*.json")})
    ]


def operator_table(machine: Machine) -> text.Table:
    """Ours beside the fastest exact way that is not ours."""
    table = [["case", "ours", "ms", "of the limit", "fastest other", "its time over ours"]]
    for extra in machine.works():
        providers = extra["providers"]
        ours, other = ours_of(providers), fastest_other(providers)
        row = providers[ours]
        over = providers[other]["ratio"] if other and providers[other]["over"] == ours else None
        chosen = row["plan"].partition(":")[0] if ours == "auto" else ""
        ours = f"{ours}: {chosen}" if chosen else ours
        share, ratio = f"{row['share_of_limit']:.1%}", "" if over is None else f"{over:.2f}"
        table.append([extra["case"], ours, text.milliseconds(row["median"]), share, other, ratio])
    return table if len(table) > 1 else []


def step_table(benchmarks: Sequence[Mapping[str, Any]]) -> text.Table:
    """Times, and where they were measured, speed, share of the matrix rate and memory."""
    timed = [
        (benchmark["extra_info"]["case"], name, row)
        for benchmark in benchmarks
        for name, row in benchmark["extra_info"]["providers"].items()
        if "median" in row
    ]
    measured = ("pictures_per_s", "mfu", "peak_bytes", "state_bytes")
    shown = [key for key in measured if any(key in row for _, _, row in timed)]
    columns = {key: text.NUMBERS[key] for key in shown}
    table = [["case", "provider", "median ms", "quartiles", "over the first", *(name for name, _ in columns.values())]]
    for case, name, row in timed:
        spread = f"{text.milliseconds(row['q1'])} to {text.milliseconds(row['q3'])}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        numbers = [write(row[key]) if key in row else "" for key, (_, write) in columns.items()]
        table.append([case, name, text.milliseconds(row["median"]), spread, ratio, *numbers])
    return table


def plots_of(machine: Machine) -> dict[str, str]:
    """File name -> SVG."""
    made: dict[str, str] = {}
    works = list(machine.works())
    for run in machine.runs():
        if of_run := list(run.works()):
            # Beside the limits of its own run; the first has the name that pages know.
            name = f"roofline-{len(made) + 1}.svg" if made else "roofline.svg"
            made[name] = roofline_of(run, of_run)
    for name, benchmarks in machine.others():
        groups = {}
        for benchmark in benchmarks:
            rows = benchmark["extra_info"]["providers"].items()
            timed = [(provider, row["median"], row["q1"], row["q3"]) for provider, row in rows if "median" in row]
            groups[benchmark["extra_info"]["case"]] = timed
        made[f"{name}.svg"] = plots.bars(name.replace("_", " "), groups)
    for operator in SUBJECTS:
        made |= cost_plots(operator, [extra for extra in works if extra["operator"] == operator])
    return made


def roofline_of(machine: Machine, works: Sequence[dict[str, Any]]) -> str:
    points = []
    for extra in works:
        providers, flops = extra["providers"], extra["flops"]
        other = fastest_other(providers)
        rate = flops / providers[other]["median"] if other else None
        ours = flops / providers[ours_of(providers)]["median"]
        points.append((f"{extra['operator']} {extra['name']}", flops / extra["bytes"], ours, rate))
    title = f"{text.named(machine.info)}: ours filled, the fastest other hollow"
    return plots.roofline(title, machine.info["limits"], points)


def cost_plots(operator: str, cases: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Cost of a picture against the number N of its tokens and the number B of pictures, all other sizes alike."""
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for extra in cases:
        if {"N", "B"} <= extra["shape"].keys():
            rest = tuple((letter, size) for letter, size in extra["shape"].items() if letter not in "NB")
            alike.setdefault((extra["dtype"], *rest), []).append(extra)
    made = {}
    for (dtype, *rest), group in alike.items():
        sizes = [f"{letter} {size}" for letter, size in rest]
        name = "-".join([operator, *sizes, dtype]).replace(" ", "").lower()
        by_tokens, by_batch = family(group, "B", "N"), family(group, "N", "B")
        if len(by_tokens) > 1:
            title = ", ".join([operator, *sizes, dtype])
            made[f"{name}-tokens.svg"] = cost_plot(title, "N, tokens of a picture", "N", by_tokens)
        if len(by_batch) > 1:
            title = ", ".join([operator, *sizes, f"N {by_batch[0]['shape']['N']}", dtype])
            made[f"{name}-batch.svg"] = cost_plot(title, "B, pictures", "B", by_batch)
    return made


def family(group: Sequence[dict[str, Any]], fixed: str, varied: str) -> list[dict[str, Any]]:
    """The most cases that share one size, by the other; where none share B, the largest B of each N."""
    families: dict[int, dict[int, dict[str, Any]]] = {}
    for extra in group:
        families.setdefault(extra["shape"][fixed], {})[extra["shape"][varied]] = extra
    best = families[max(families, key=lambda size: (len(families[size]), size))]
    if len(best) == 1 and varied == "N":
        best = {extra["shape"]["N"]: extra for extra in sorted(group, key=lambda extra: extra["shape"]["B"])}
    return [best[size] for size in sorted(best)]


def cost_plot(title: str, x_name: str, letter: str, cases: Sequence[dict[str, Any]]) -> str:
    """A line for each provider that has a time everywhere, but not for candidates, which are ours with other tiles."""
    series = {}
    for name, row in cases[0]["providers"].items():
        rows = [extra["providers"].get(name, {}) for extra in cases]
        if row.get("kind") != CANDIDATE and all("median" in row for row in rows):
            shapes = [extra["shape"] for extra in cases]
            series[name] = [
                (shape[letter], 1e3 * row["median"] / shape["B"]) for shape, row in zip(shapes, rows, strict=True)
            ]
    return plots.costs(f"{title}: {cases[0]['direction']}", x_name, series)


def results_page(machines: Sequence[Machine], pictures: Mapping[str, Sequence[str]]) -> str:
    lines = [INTRODUCTION]
    for machine in machines:
        name, about = machine.folder.name, text.machine_lines(machine.info)
        lines += [f"## {text.named(machine.info)}", "", *(f"- {line}" for line in about), ""]
        if machine.info["gpu"]:
            rows = [row for found in machine.subjects.values() for row in results.rows_of(found)]
            said = verdicts(rows)
            lines += [*text.markdown(text.target_table(said)), ""]
            lines += [line for note in text.target_notes(said) for line in (f"\\{note}", "")]
        lines += [
            line for picture in pictures[name] for line in (f"![{Path(picture).stem}](results/{name}/{picture})", "")
        ]
        for subject, found in machine.subjects.items():
            lines += subject_part(subject, found, about)
    return "\n".join(lines).rstrip("\n") + "\n"


def subject_part(subject: str, found: Document, about: Sequence[str]) -> list[str]:
    """A heading, what is different from the machine's other results, a table a case, and what has no time."""
    own = text.machine_lines(found["machine_info"])
    lines = [f"### {subject}", ""]
    if own != list(about):
        lines += ["Of another run:", "", *(f"- {line}" for line in own), ""]
    benchmarks = [one for one in found["benchmarks"] if "providers" in one["extra_info"]]
    for benchmark in benchmarks:
        table, facts = text.markdown(text.row_table(benchmark)), text.facts_line(benchmark)
        if table:
            lines += [f"**{benchmark['extra_info']['case']}**", "", *table, "", *([facts, ""] if facts else [])]
    missing = text.without_a_time(benchmarks)
    return lines + (["Without a time:", "", *(f"- {line}" for line in missing), ""] if missing else [])


def about_run(info: Mapping[str, Any]) -> str:
    about = f"**{text.named(info)}**, {text.threads(info)}, torch {info['versions']['torch']}, commit {info['commit']}"
    return "; ".join([about, *text.about_kind(info), text.load(info)])


def about_mfu(benchmarks: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line where a step computes more than the machine is said to, for a reader who knows that it cannot."""
    rows = [row for benchmark in benchmarks for row in benchmark["extra_info"]["providers"].values()]
    if all(row.get("mfu", 0) <= 1 for row in rows):
        return []
    return [
        "An MFU above 100%: most likely the machine was faster then than when the run began, where its matrix rate was "
        "measured; others may have had a share of it.",
        "",
    ]


def readme_part(machines: Sequence[Machine], pictures: Mapping[str, Sequence[str]]) -> str:
    lines: list[str] = []
    for machine in machines:
        for run in machine.runs():
            steps = [benchmarks for name, benchmarks in run.others() if name.startswith("train_step")]
            tables = [operator_table(run), *map(step_table, steps)]
            if any(tables):
                lines += [f"{about_run(run.info)}:", ""]
                lines += [line for table in tables if table for line in [*text.markdown(table), ""]]
                lines += about_mfu([benchmark for benchmarks in steps for benchmark in benchmarks])
        shown = [name for name in pictures[machine.folder.name] if name.startswith(("roofline", "train_step"))]
        lines += [f"![{Path(name).stem}]({FOLDER}/{machine.folder.name}/{name})" for name in shown] + [""]
    return "\n".join(lines).strip("\n")


def pages(root: Path = ROOT) -> dict[Path, str]:
    """Every file that results give, with what is to stand in it. Raises ValueError for results that are none."""
    machines = read_machines(root / FOLDER)
    made: dict[Path, str] = {}
    pictures: dict[str, list[str]] = {}
    for machine in machines:
        drawn = plots_of(machine)
        pictures[machine.folder.name] = list(drawn)
        made |= {machine.folder / name: svg for name, svg in drawn.items()}
    made[root / "benchmarks" / "RESULTS.md"] = results_page(machines, pictures)
    readme = root / "README.md"
    before, begin, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme}: the place of the tables is not marked; it needs the lines {BEGIN} and {END}")
    made[readme] = f"{before}{BEGIN}\n\n{readme_part(machines, pictures)}\n\n{END}{after}"
    return made


def left_over(root: Path, made: Mapping[Path, str]) -> list[Path]:
    """Plots that no results give."""
    return [path for path in (root / FOLDER).glob("*/*.svg") if path not in made]


def stale(root: Path = ROOT) -> list[str]:
    """Files that are not what the results give."""
    made = pages(root)
    differ = [path for path, content in made.items() if not path.exists() or path.read_text() != content]
    return sorted(str(path.relative_to(root)) for path in [*differ, *left_over(root, made)])


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    about = "Make the pages from the results of benchmarks."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.publish", description=about)
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 where a page is not up to date")
    options = parser.parse_args(arguments)
    try:
        if options.check:
            if found := stale(root):
                print(f"error: not what the results give: {', '.join(found)}; run `make results`", file=sys.stderr)
            return 1 if found else 0
        made = pages(root)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in left_over(root, made):
        path.unlink()
    for path, content in made.items():
        results.write(content, path)
    print(f"{len(made)} files are made from the results")
    return 0


if __name__ == "__main__":
    sys.exit(main())
