"""`make bench-gpu`, rehearsed: operators need torch and triton alone, what fails is survived, nothing is published."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# Run at the start of every process: what a bare machine with a GPU lacks cannot be imported.
BARE = """
import sys
for name in ("deepspeed", "pydantic", "xformers", "transformers", "pytest", "pytest_benchmark"):
    sys.modules[name] = None
"""
HANG = """
import time

def hang(journal):
    journal.add(doing="nothing")
    time.sleep(600)
"""


@pytest.fixture
def at_start() -> str:
    """What each process runs first."""
    return BARE


@pytest.fixture
def run(root, tmp_path, at_start):
    """Run Python with the sources on its path by links, as on a machine where nothing was installed."""
    (tmp_path / "fused_beit").mkdir()
    for part in ("kernels", "engine", "ds_configs"):
        (tmp_path / "fused_beit" / part).symlink_to(root / part)
    (tmp_path / "sitecustomize.py").write_text(at_start)
    (tmp_path / "hang.py").write_text(HANG)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900)

    return run


@pytest.fixture
def rehearse(run, tmp_path):
    """Run a rehearsal; returns the process, the files by subject, and their folder."""

    def rehearse(*arguments: str) -> tuple[subprocess.CompletedProcess, dict[str, dict], Path]:
        output = tmp_path / "output"
        shown = run("-m", "benchmarks.gpu", "--rehearse", "--output", str(output), *arguments)
        (folder,) = output.iterdir()
        assert (folder / "gpu.txt").read_text() in shown.stdout
        return shown, {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}, folder

    return rehearse


def rows_of(document: dict) -> dict[tuple[str, str], dict]:
    """Rows by direction and provider."""
    found = {}
    for benchmark in document["benchmarks"]:
        extra = benchmark["extra_info"]
        found |= {(extra["direction"], provider): row for provider, row in extra["providers"].items()}
    return found


def test_a_rehearsal_survives_what_is_planted_and_times_the_rest(run, rehearse):
    planted = ["planted-wrong", "planted-out-of-memory", "planted-crash"]
    providers = "triton,triton-shared,triton-backward-64x64,batch-loop,sdpa,flash-no-bias,xformers"
    choice = ("--operators", "rel_pos_attention", "--cases", "base", "--providers", providers)
    shown, documents, folder = rehearse(*choice, "--plant", ",".join(planted))
    assert shown.returncode == 1, shown.stderr
    document = documents["rel_pos_attention"]
    assert document["finished"]
    rows = rows_of(document)
    for direction in ("forward", "forward and backward", "backward"):
        wrong, no_memory, crashed = [rows[direction, name] for name in planted]
        assert "exceeds" in wrong["failed"]
        assert no_memory["absent"].startswith("out of memory")
        assert "signal 9" in crashed["failed"]
        assert "not installed" in rows[direction, "xformers"]["absent"]
        assert not any("median" in row for row in (wrong, no_memory, crashed))
        for name in ("triton", "triton-shared", "triton-backward-64x64", "batch-loop", "sdpa", "flash-no-bias"):
            assert rows[direction, name]["median"] > 0, f"{name}, {direction}"
    assert "tma family" in rows["forward", "triton"]["plan"]
    failures = [failure.split(":")[0] for failure in document["failed"]]
    assert failures == [f"rel_pos_attention base, {name}" for name in ("planted-wrong", "planted-crash")]
    assert "MEAN NOTHING" in shown.stdout
    assert "rehearsed" in shown.stdout
    assert " held" not in shown.stdout
    assert " missed" not in shown.stdout

    path = folder / "rel_pos_attention.json"
    refused = run("-c", f"from pathlib import Path; from benchmarks.results import load; load(Path({str(path)!r}))")
    assert "are not for publishing" in refused.stderr


def test_an_operator_is_rehearsed_beside_its_bound_and_without_the_engine_no_step(rehearse):
    names = "triton,cross-entropy-fp32,products,fused_beit,transformers, sdpa"
    choice = ("--operators", "token_loss,train_step", "--cases", "base,base-bf16,large-bf16")
    shown, documents, _ = rehearse(*choice, "--providers", names)
    assert shown.returncode == 0, shown.stderr
    steps = rows_of(documents["train_step"])
    assert {group for group, _ in steps} == {"as they are", "compiled", "ours varied"}
    assert {provider for _, provider in steps} == {"fused_beit", "transformers, sdpa"}
    for row in steps.values():
        assert row["absent"].startswith("the engine cannot be imported: ")
    assert documents["train_step"]["failed"] == []
    assert "without a time: fused_beit; transformers, sdpa: the engine cannot be imported: " in shown.stdout
    assert shown.stdout.count("train_step base-bf16, as they are ...") == 1
    assert "train_step large-bf16, as they are ..." not in shown.stdout  # one process has found out
    rows = rows_of(documents["token_loss"])
    assert {direction for direction, _ in rows} == {"forward", "forward and backward"}
    assert all(row["median"] > 0 for row in rows.values())
    assert re.search(r"token_loss: over the time of its products +at most 1.25 x .* rehearsed", shown.stdout)


@pytest.mark.slow
def test_a_whole_rehearsal_goes_well(rehearse):
    shown, documents, _ = rehearse()
    assert shown.returncode == 0, shown.stderr
    timed = set()
    assert all(
        "the engine cannot be imported" in row["absent"] for row in rows_of(documents.pop("train_step")).values()
    )
    for document in documents.values():
        assert document["failed"] == []
        for benchmark in document["benchmarks"]:
            extra = benchmark["extra_info"]
            assert extra["providers"]["triton"]["median"] > 0, extra["case"]
            timed.add(extra["operator"])
    assert len(timed) == 8
    rows = rows_of(documents["rel_pos_attention"])
    timed = {provider for (_, provider), row in rows.items() if "median" in row}
    candidates = {"triton-any-order", "triton-forward-64x64", "triton-backward-64x64", "batch-loop"}
    assert candidates | {"sdpa-unaligned", "reference"} <= timed


@pytest.mark.parametrize("at_start", [""], ids=["everything there"])
def test_a_step_is_rehearsed_and_survives_what_is_planted(rehearse):
    ours = "fused_beit, tokenizer in the loop,fused_beit, ZeRO 1"
    choice = ("--operators", "train_step", "--cases", "base-bf16", "--providers", ours)
    planted = ("planted-wrong", "planted-out-of-memory", "planted-crash")
    shown, documents, _ = rehearse(*choice, "--plant", ",".join(planted))
    assert shown.returncode == 1, shown.stderr
    document = documents["train_step"]
    assert document["finished"]
    rows = rows_of(document)
    wrong, no_memory, crashed = [rows["ours varied", name] for name in planted]
    assert "gradient of head: error" in wrong["failed"]
    assert no_memory["absent"].startswith("out of memory")
    assert "signal 9" in crashed["failed"]
    loop, sharded = [rows["ours varied", f"fused_beit, {name}"] for name in ("tokenizer in the loop", "ZeRO 1")]
    for row in (loop, sharded):
        assert row["median"] > 0
        assert row["pictures_per_s"] == pytest.approx(2 / row["median"])
        assert row["errors"]["moment of final norm"] < 1e-5
    assert sharded["over"] == "fused_beit, tokenizer in the loop"
    (benchmark,) = document["benchmarks"]
    assert (benchmark["extra_info"]["operator"], benchmark["extra_info"]["name"]) == ("train_step", "base-bf16")
    failures = [failure.split(":")[0] for failure in document["failed"]]
    assert failures == [f"train_step base-bf16, ours varied, {name}" for name in ("planted-wrong", "planted-crash")]


@pytest.mark.slow
@pytest.mark.parametrize("at_start", [""], ids=["everything there"])
def test_a_whole_rehearsal_of_the_step_goes_well(rehearse):
    shown, documents, _ = rehearse("--operators", "train_step")
    assert shown.returncode == 0, shown.stderr
    rows = rows_of(documents["train_step"])
    assert len(documents["train_step"]["benchmarks"]) == 4
    timed = {provider for (_, provider), row in rows.items() if "median" in row}
    assert timed >= {"fused_beit", "fused_beit, compiled", "fused_beit, tokenizer in the loop", "fused_beit, ZeRO 1"}
    assert "fused_beit, tokenizer beside it" in timed
    ours = ("tokenizer in the loop", "tokenizer beside it", "ZeRO 1", "no DeepSpeed", "compiled")
    assert timed >= {"fused_beit, triton", *(f"fused_beit, triton, {name}" for name in ours)}
    assert timed >= {"transformers, sdpa", "transformers, eager", "transformers, compiled"}
    assert re.search(r"train_step: share of the matrix rate, large\* +at least 57 % .* rehearsed", shown.stdout)


def test_what_is_not_begun_in_time_is_left_out(rehearse):
    shown, documents, _ = rehearse("--minutes", "0")
    assert shown.returncode == 0, shown.stderr
    reasons = {row["absent"] for document in documents.values() for row in rows_of(document).values()}
    assert reasons == {"not reached in the time given"}
    assert len(documents) == 6
    assert "rehearsed" not in shown.stdout
    assert re.search(r"the whole plan is given \d+ s on a GPU", shown.stdout)
    assert re.search(r"train_step large-bf16, as they are +\d+ +0\n", shown.stdout)


def test_a_process_that_hangs_is_given_up(run, tmp_path):
    code = "from benchmarks.supervised import supervise; import hang, pathlib; "
    code += f"print(supervise(hang.hang, journal=pathlib.Path({str(tmp_path / 'journal')!r}), silence=2, until=1e9))"
    shown = run("-c", code)
    assert "was silent for 2 s" in shown.stdout, shown.stderr
    assert "'doing': 'nothing'" in shown.stdout


def test_wrong_options_get_one_sentence(run):
    wrong = {
        ("--rehearse", "--cases", "tiny"): "there is no case 'tiny'; there are: base; n577",
        ("--operators", "softmax"): "there is no operator 'softmax'; there are: rel_pos_attention",
        ("--providers", "triton,spda"): "there is no provider 'spda'; there are: triton; triton-any-order",
        ("--providers", "timm,transformers, spda"): "there is no provider 'transformers, spda'; there are: triton",
        ("--plant", "planted-wrong"): "--plant is for --rehearse",
        ("--rehearse",): "--rehearse needs --output FOLDER",
        ("--rehearse", "--output", "benchmarks/results"): "outside benchmarks/results",
    }
    code = "from benchmarks.gpu import main\n"
    for options in wrong:
        code += f"try: main({options!r})\nexcept SystemExit as error: print(error)\n"
    shown = run("-c", code)
    lines = shown.stdout.splitlines()
    assert len(lines) == len(wrong), shown.stderr
    for line, sentence in zip(lines, wrong.values(), strict=True):
        assert line.startswith("error: ")
        assert sentence in line


def test_a_part_of_a_run_does_not_replace_published_results(run):
    code = """
from benchmarks import machine
from benchmarks.gpu import read_options, unpublishable

machine.commit = lambda: "123456789abc-dirty"
print(unpublishable(read_options(["--commit", "0123", "--output", "/elsewhere"])))
machine.commit = lambda: "unknown"
print(unpublishable(read_options(["--cases", "base"])))
print(unpublishable(read_options(["--providers", "triton", "--output", "benchmarks/results"])))
print(unpublishable(read_options(["--operators", "token_loss"])))
print(unpublishable(read_options(["--operators", "token_loss", "--output", "/elsewhere"])) == "")
print(unpublishable(read_options(["--commit", "0123"])) == "")
"""
    known, *parts, elsewhere, whole = run("-c", code).stdout.splitlines()
    assert "git says that this is 123456789abc-dirty; leave --commit out" in known
    for name, part in zip(("cases", "providers", "operators"), parts, strict=True):
        assert f"keeps whole runs; leave --{name} out, or give --output FOLDER" in part
    assert elsewhere == whole == "True"


def test_a_rehearsal_whose_interpreter_cannot_work_stops_in_a_sentence(run):
    code = """
from importlib import metadata
from benchmarks.gpu import main
metadata.version = {"triton": "3.6.0", "numpy": "2.5.2"}.__getitem__
main(["--rehearse", "--output", "/tmp"])
"""
    shown = run("-c", code)
    assert shown.returncode == 1
    assert shown.stderr.splitlines() == [
        "error: the interpreter of Triton 3.6.0 fails beside NumPy 2.5.2; it needs triton>=3.7 or numpy<2.4"
    ]


@pytest.mark.gpu
def test_a_short_run_is_replayed_as_a_cuda_graph_and_what_waits_is_not(run):
    shown = run(
        "-c",
        """
import torch
from benchmarks.timers import EventTimer, Staged, timed_by

x = torch.ones(4096, device="cuda", requires_grad=True)
runs = {
    "short": lambda: x * 2,
    "backward": Staged(lambda: (x * 2).sum(), lambda y: torch.autograd.grad(y, x)),
    "waits": lambda: x.nonzero(),
    "short after it": lambda: x * 3,
}
timer = EventTimer()
for name, work in runs.items():
    seconds = max(timer(work) for _ in range(3))
    print(name, timed_by(timer, work), 0 < seconds < 1e-2, sep=", ")
""",
    )
    graph = "CUDA graph between events, True"
    assert shown.stdout.splitlines() == [
        f"short, {graph}",
        f"backward, {graph}",
        "waits, events, True",
        f"short after it, {graph}",
    ], shown.stderr
