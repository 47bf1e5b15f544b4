"""Results of benchmarks become pages, and nothing else does: not a rehearsal, a dirty tree or another format."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmark_modules import benchmark

# A root of its own with results of one machine, published; then what `code` does there.
PUBLISH = """
import json
from pathlib import Path
from benchmarks import machine, results
from benchmarks.measuring import about
from benchmarks.operators import OPERATORS
from benchmarks.publish import BEGIN, END, main

root = Path({folder!r})
limits = {{"bytes_per_s": 1e10, "flops_per_s": 1e11, "flops_per_s_in": {{"float32": 1e11}}, "empty_run_s": 1e-6}}
facts = {{"device": "Abacus", "gpu": None, "driver": None, "threads": 2, "load": 0.5, "cores": 2, "python": "3.11"}}
facts |= {{"versions": {{"torch": "2"}}, "commit": "123456789abc", "dirty": False, "sources": "0"}}
row = {{"median": 2e-3, "q1": 1e-3, "q3": 3e-3, "rounds": 5, "over": "auto", "errors": {{"output": 1e-7}}}}
rates = {{"gb_per_s": 5.0, "tflop_per_s": 0.05, "share_of_limit": 0.25}}

def one(operator, number, direction):
    case = OPERATORS[operator].on_cpu[number]
    rows = {{
        "triton": {{"kind": "ours", "absent": "there is no GPU"}},
        "auto": {{**row, **rates, "kind": "ours", "ratio": None, "over": "", "plan": "reference: no GPU"}},
        "other": {{**row, **rates, "kind": "peer", "ratio": 1.25, "median": 2.5e-3}},
    }}
    extra = about(case, direction) | {{"case": f"{{case}}, {{direction}}", "providers": rows}}
    return results.entry(operator, f"test_{{operator}}[{{case.name}}]", extra, [1e-3, 2e-3, 3e-3])

extra = {{"case": "tiny", "GFLOP": 3.5, "providers": {{"ours": row | {{"ratio": None}}}}}}
step = results.entry("train_step", "test_step", extra, [1.0])
benchmarks = [one("rel_pos_attention", number, "forward and backward") for number in range(1, 6)]
benchmarks += [one("nearest_code", 0, "forward"), step]
whole = results.document(results.head(facts, limits, results.MEASURED), benchmarks)
folder = root / "benchmarks" / "results" / "abacus"
(root / "README.md").write_text(f"before\\n{{BEGIN}}\\nold\\n{{END}}\\nafter\\n")
results.write_subjects(whole, folder)
assert main([], root) == 0
{code}
"""


@pytest.fixture
def published(tmp_path) -> Callable[[str], SimpleNamespace]:
    """Publish results in a folder, run code there, and return what it printed."""
    benchmark("publish")

    def published(code: str) -> SimpleNamespace:
        said, complained = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
            exec(PUBLISH.format(folder=str(tmp_path), code=code), {})
        return SimpleNamespace(stdout=said.getvalue(), stderr=complained.getvalue())

    return published


def test_the_pages_are_what_the_results_give(root):
    command = [sys.executable, "-m", "benchmarks.publish", "--check"]
    shown = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr


# A whole run on a GPU with the step in it, beside the results on a processor; the numbers are made up.
GPU_RUN = """
from benchmarks import step_names as names

limits = {"bytes_per_s": 4e12, "flops_per_s": 8e14, "flops_per_s_in": {"bfloat16": 8e14}, "empty_run_s": 1e-6}
facts |= {"device": "Graphics", "gpu": "Graphics", "driver": "1.2"}
times = {"median": 1.0, "q1": 0.9, "q3": 1.1, "rounds": 9, "errors": {"loss": 1e-4}, "pictures_per_s": 4321.0}
absent = {"absent": "out of memory: tried to allocate"}

def group(case, name, rows):
    about = {"operator": names.SUBJECT, "name": case, "direction": name, "pictures": 128, "GFLOP": 13824.0}
    extra = about | {"case": f"{case}, {name}", "providers": rows}
    return results.entry("train_step", f"test_train_step[{case}-{name}]", extra, [1.0])

def over(ratio, **more):
    return times | {"ratio": ratio, "over": names.OURS} | more

ours = times | {"ratio": None, "over": "", "mfu": 0.306, "peak_bytes": 9e9, "state_bytes": 1e9}
timm = over(2.5, mfu=0.245, peak_bytes=25e9, state_bytes=1e9)
rows = {names.OURS: ours, names.TRITON: over(0.5, mfu=0.612), names.TIMM: timm, "transformers, eager": absent}
varied = {names.OURS: ours, names.TRITON: over(0.5), names.by_triton(names.IN_THE_LOOP): over(0.8)}
step = [
    group(names.BASE, names.AS_THEY_ARE, rows),
    group(names.BASE, names.VARIED, varied),
    group(names.LARGE, names.COMPILED, dict.fromkeys(names.GROUPS[names.COMPILED], absent)),
]
whole = results.document(results.head(facts, limits, results.MEASURED), step) | {"finished": True}
results.write_subjects(whole, root / "benchmarks" / "results" / "graphics")
print(main([], root), main(["--check"], root))
"""


def test_a_run_on_a_gpu_has_its_step_and_its_targets_on_the_pages(published, tmp_path):
    shown = published(GPU_RUN)
    assert shown.stdout.endswith("0 0\n"), shown.stderr
    readme, page = ((tmp_path / name).read_text() for name in ("README.md", "benchmarks/RESULTS.md"))
    head = "| case | provider | median ms | quartiles | over the first | pictures/s | MFU | peak MB | state MB |"
    assert head in readme
    assert "| base-bf16, as they are | timm | 1000 | 900 to 1100 | 2.50 | 4321 | 24.5% | 25000.0 | 1000.0 |" in readme
    assert "![train_step](benchmarks/results/graphics/train_step.svg)" in readme
    assert "| train_step: share of the matrix rate, base* | at least 48 % | 61.2 % | held |" in page
    assert "\n\\* of the matrix rate that this machine reached" in page
    assert "| train_step: speed kept with the tokenizer in the loop | at least 70 % | 62.5 % | missed |" in page
    assert "| train_step: share of the matrix rate, large* | at least 57 % |  | not measured |" in page
    assert "pictures 128, GFLOP 1.382e+04" in page
    assert "transformers, eager (base-bf16, as they are)" in page
    plot = (tmp_path / "benchmarks/results/graphics/train_step.svg").read_text()
    assert "base-bf16, ours varied" in plot
    assert "large-bf16" not in plot  # nothing of it has a time


FAST = "AVX-512 with bf16 and AMX"
MARK = f"imitated by ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 on a processor with {FAST}"


@pytest.mark.parametrize(
    ("facts", "named", "folder"),
    [
        ({}, "Abacus(R) CPU, instruction set not recorded", "abacus-cpu-instruction-set-not-recorded"),
        ({"instruction_set": "AVX2", "imitated": ""}, "Abacus(R) CPU, AVX2", "abacus-cpu-avx2"),
        ({"instruction_set": FAST, "imitated": ""}, f"Abacus(R) CPU, {FAST}", "abacus-cpu-avx-512-with-bf16-and-amx"),
        ({"instruction_set": "AVX2", "imitated": MARK}, "Abacus(R) CPU, AVX2, imitated", "abacus-cpu-avx2-imitated"),
        ({"gpu": "Abacus", "instruction_set": "AVX2"}, "Abacus(R) CPU", "abacus-cpu"),
    ],
)
def test_results_of_a_processor_are_named_by_its_instruction_set_and_those_of_a_gpu_are_not(facts, named, folder):
    facts = {"device": "Abacus(R) CPU", "gpu": None} | facts
    assert benchmark("text").named(facts) == named
    assert benchmark("machine").folder_name(facts) == folder


def test_facts_and_limits_are_those_of_the_processor_as_it_is_used(monkeypatch):
    machine, cpu = benchmark("machine"), torch.device("cpu")
    facts = machine.facts(cpu)
    assert (facts["instruction_set"], facts["imitated"]) == (machine.instruction_set(), machine.imitation())
    for fast, measured in {True: ["float32", "bfloat16"], False: ["float32"]}.items():
        monkeypatch.setattr(machine, "has_bf16", lambda fast=fast: fast)
        limits = machine.limits(cpu, small=True)
        assert list(limits["flops_per_s_in"]) == measured
        assert limits["flops_per_s"] == limits["flops_per_s_in"]["float32"]


def test_the_same_processor_imitating_a_lesser_one_has_tables_of_its_own_that_say_so(published, tmp_path):
    published(
        f"""
for imitated in ("", {MARK!r}):
    facts |= {{"instruction_set": "AVX2" if imitated else {FAST!r}, "imitated": imitated}}
    whole = results.document(results.head(facts, limits, results.MEASURED), benchmarks)
    results.write_subjects(whole, root / "benchmarks" / "results" / machine.folder_name(facts))
assert main([], root) == 0
"""
    )
    readme, page = ((tmp_path / name).read_text() for name in ("README.md", "benchmarks/RESULTS.md"))
    names = ["Abacus, instruction set not recorded", f"Abacus, {FAST}", "Abacus, AVX2, imitated"]
    for name in names:
        assert readme.count(f"**{name}**, 2 threads, torch 2, commit 123456789abc; ") == 1
        assert page.count(f"## {name}\n\n- {name}, 2 threads, ") == 1
    assert f"commit 123456789abc; AVX2 {MARK}; load" in readme
    assert page.count(f"- AVX2 {MARK}\n") == 1
    assert "![train_step](benchmarks/results/abacus-avx2-imitated/train_step.svg)" in readme


def test_a_stale_table_plot_or_page_is_named(published, tmp_path):
    shown = published(
        """
print(main(["--check"], root))
readme = root / "README.md"
right = readme.read_text()
readme.write_text(right.replace("1.25", "9.25"))
main(["--check"], root)
readme.write_text(right.replace("before", "a person's own words"))
print(main(["--check"], root))
(folder / "left.svg").write_text("of results that are gone")
(root / "benchmarks" / "RESULTS.md").unlink()
print(main(["--check"], root))
print(main([], root), main(["--check"], root), (folder / "left.svg").exists())
"""
    )
    assert shown.stdout.split("\n")[1:] == ["0", "0", "1", "6 files are made from the results", "0 0 False", ""], shown
    edited, gone = shown.stderr.splitlines()
    assert edited == "error: not what the results give: README.md; run `make results`"
    assert "benchmarks/RESULTS.md, benchmarks/results/abacus/left.svg" in gone
    readme, page = (tmp_path / "README.md").read_text(), (tmp_path / "benchmarks" / "RESULTS.md").read_text()
    assert readme.startswith("a person's own words\n")
    assert readme.endswith("\nafter\n")
    assert "old" not in readme
    assert "| auto: reference | 2 | 25.0% | other | 1.25 |" in readme
    assert "GFLOP 3.5" in page
    assert "- triton: there is no GPU" in page
    plots = {path.name for path in tmp_path.glob("benchmarks/results/abacus/*.svg")}
    sizes = "rel_pos_attention-h3-d64-float32"
    assert plots == {"roofline.svg", "train_step.svg", f"{sizes}-batch.svg", f"{sizes}-tokens.svg"}


def test_each_table_and_roofline_stands_under_the_run_that_gave_it(published, tmp_path):
    published(
        """
path = folder / "nearest_code.json"
found = json.loads(path.read_text())
found["machine_info"] |= {"load": 7.5, "versions": {"torch": "3"}, "limits": limits | {"bytes_per_s": 2e10}}
path.write_text(json.dumps(found))
assert main([], root) == 0
"""
    )
    readme = (tmp_path / "README.md").read_text()
    first, second = readme.split("**Abacus, instruction set not recorded**, 2 threads, torch ")[1:]
    assert first.startswith("2, commit 123456789abc; load when it began: 0.5 on 2 cores:")
    assert second.startswith("3, commit 123456789abc; load when it began: 7.5 on 2 cores:")
    assert "rel_pos_attention" in first
    assert "nearest_code" in second.partition("![")[0]
    assert "nearest_code" not in first
    plots = tmp_path / "benchmarks" / "results" / "abacus"
    assert "rel_pos_attention" in (plots / "roofline.svg").read_text()
    assert "nearest_code" not in (plots / "roofline.svg").read_text()
    assert "nearest_code" in (plots / "roofline-2.svg").read_text()


@pytest.mark.parametrize(("mfu", "said"), [(1.029, True), (0.99, False)])
def test_a_step_above_the_measured_matrix_rate_is_explained(published, tmp_path, mfu, said):
    published(
        f"""
path = folder / "train_step.json"
found = json.loads(path.read_text())
found["benchmarks"][0]["extra_info"]["providers"]["ours"]["mfu"] = {mfu}
path.write_text(json.dumps(found))
assert main([], root) == 0
"""
    )
    readme = (tmp_path / "README.md").read_text()
    assert f"| {mfu:.1%} |" in readme
    assert ("An MFU above 100%: most likely the machine was faster" in readme) == said


def test_results_that_mean_nothing_are_refused_in_a_sentence(published):
    wrong = {
        '{"format": 0}': "results of format 0, and this version reads format 1; measure again",
        '{"dirty": True, "commit": "1-dirty"}': "results of commit 1-dirty, which does not say what was measured",
        '{"means": results.NOTHING}': "they mean nothing: a rehearsal",
        '{"means": results.SMOKE}': "they mean nothing: smoke sizes",
    }
    code = "path = folder / 'nearest_code.json'\nright = json.loads(path.read_text())\n"
    for change in wrong:
        code += f"path.write_text(json.dumps(right | {{'machine_info': right['machine_info'] | {change}}}))\n"
        code += "assert main(['--check'], root) == main([], root) == 1\n"
    code += "path.write_text(json.dumps(right | {'finished': False}))\nmain([], root)\n"
    code += "path.write_text('half a fi')\nmain([], root)\n"
    shown = published(code)
    lines = shown.stderr.splitlines()
    sentences = [sentence for sentence in wrong.values() for _ in range(2)]
    sentences += ["did not come to its end", "is no JSON"]
    assert len(lines) == len(sentences)
    for line, sentence in zip(lines, sentences, strict=True):
        assert line.startswith("error: ")
        assert "nearest_code.json: " in line
        assert sentence in line


def run_pytest(root: Path, *arguments: str, subject: str = "nearest_code") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"benchmarks/bench_{subject}.py"]
    command += ["--benchmark-only", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    environment.pop("PYTEST_XDIST_WORKER", None)
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)


WRONG_OPTIONS = {
    ("--cases", "cpu-n576"): "there is no case 'cpu-n576'; there are: ",
    ("--providers", "triton,spda"): "there is no provider 'spda'; there are: after-norm",
    ("--keep-results", "--sizes", "smoke"): "smoke sizes mean nothing; keep their results in another folder",
    ("--keep-results", "--providers", "auto"): "--keep-results keeps whole files of benchmarks; leave --providers",
}
ALL_WRONG = """
import pytest

for options in {options}:
    ended = pytest.main(["-p", "no:cacheprovider", "benchmarks/bench_nearest_code.py", "--benchmark-only", *options])
    assert ended == pytest.ExitCode.USAGE_ERROR, ended
"""


def test_a_wrong_option_gets_one_sentence(root):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-c", ALL_WRONG.format(options=list(WRONG_OPTIONS))]
    shown = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stderr.strip().split("\n")
    errors = [line for line in lines if line]
    assert len(errors) == len(WRONG_OPTIONS), shown.stderr
    for line, sentence in zip(errors, WRONG_OPTIONS.values(), strict=True):
        assert line.startswith("ERROR: ")
        assert sentence in line


def test_kept_results_are_pytest_benchmarks_own_and_name_no_machine(root, tmp_path):
    shown = run_pytest(root, "--sizes", "smoke", "--keep-results", str(tmp_path), subject="residual_norm")
    assert shown.returncode == 0, shown.stdout[-3000:]
    (path,) = tmp_path.glob("*/*.json")
    assert path.name == "residual_norm.json"
    document = json.loads(path.read_text())
    info = document["machine_info"]
    assert info["limits"]["bytes_per_s"] > 0
    assert info["versions"]["torch"]
    assert info["means"] != "measured"
    assert not {"node", "release"} & info.keys()
    assert str(root) not in path.read_text()
    assert " at 0x" not in path.read_text()
    backward = document["benchmarks"][-1]
    assert backward["extra_info"]["direction"] == "backward"
    # Of the backward alone, as its row: not of the forward before it, which is not timed.
    rows = backward["extra_info"]["providers"]
    assert backward["stats"]["median"] == pytest.approx(rows["auto"]["median"])
    assert len(backward["stats"]["data"]) == backward["stats"]["rounds"] == rows["auto"]["rounds"]
    assert rows["auto"]["share_of_limit"] > 0
    assert rows["auto"]["plan"].startswith("reference: ")

    program = shutil.which("pytest-benchmark", path=str(Path(sys.executable).parent))
    compared = subprocess.run([program, "compare", str(path)], capture_output=True, text=True, timeout=60)
    assert compared.returncode == 0, compared.stderr
    assert "test_residual_norm[" in compared.stdout
