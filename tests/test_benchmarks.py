"""The benchmarks run, and none of them times a wrong result."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STEP = ("benchmarks/bench_train_step.py", "-k", "fp32")

# A pytest plugin for the subprocess: one provider of each collected file is replaced by one with a wrong result.
SPOIL_STEP = """
def pytest_collection_finish(session):
    for providers in [item.module.PROVIDERS for item in session.items]:
        providers["{provider}"] = spoilt(providers["{provider}"])

def spoilt(make):
    def make_wrong(case):
        step = make(case)
        right = step.outputs
        object.__setattr__(step, "outputs", lambda: right() | {{"{key}": right()["{key}"] * {factor}}})
        return step
    return make_wrong
"""
# The same for operators, whose providers make works; `code` spoils what the work's call gives.
SPOIL_OPERATOR = """
import dataclasses
import time

def pytest_collection_finish(session):
    providers = session.items[0].module.OPERATORS[0].providers
    right = providers["{provider}"]
    providers["{provider}"] = right._replace(make=lambda inputs: spoilt(right.make(inputs)))

def spoilt(work):
    def call():
        found = work.call()
        {code}
        return found
    return dataclasses.replace(work, call=call)
"""
ATTENTION = "benchmarks/bench_rel_pos_attention.py"
CODES = "benchmarks/bench_nearest_code.py"
LOSS = "benchmarks/bench_token_loss.py"


def run_benchmarks(root: Path, folder: Path, *arguments: str, plugin: str = "", absent: str = ""):
    """Run benchmarks at smoke sizes; returns pytest's result and what was timed."""
    plugin += f"import sys\nsys.modules[{absent!r}] = None\n" if absent else ""
    (folder / "plugin_of_the_test.py").write_text(plugin)
    timed = folder / "timed.json"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "plugin_of_the_test", *arguments]
    command += ["--benchmark-only", "--sizes", "smoke", "--benchmark-json", str(timed)]
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    environment.pop("PYTEST_XDIST_WORKER", None)
    shown = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    text = timed.read_text() if timed.exists() else ""
    return shown, json.loads(text)["benchmarks"] if text else []


@pytest.mark.slow
def test_every_benchmark_runs_at_smoke_sizes(root, tmp_path):
    shown, timed = run_benchmarks(root, tmp_path, "benchmarks/")
    assert shown.returncode == 0, shown.stdout[-3000:]
    files = {path.name for path in (root / "benchmarks").glob("bench_*.py")}
    assert {Path(bench["fullname"].split("::")[0]).name for bench in timed} == files


def test_a_step_is_compared_and_its_json_names_the_machine(root, tmp_path):
    shown, (timed,) = run_benchmarks(root, tmp_path, *STEP)
    assert shown.returncode == 0, shown.stdout[-3000:]
    assert "transformers, sdpa" in shown.stdout
    providers = timed["extra_info"]["providers"]
    assert providers["transformers, sdpa"]["ratio"] > 0
    assert providers["fused_beit"]["errors"]["gradient of positions"] < 1e-5
    assert providers["transformers, sdpa"]["ratio_q1"] <= providers["transformers, sdpa"]["ratio"]
    assert providers["fused_beit, compiled"] == {"absent": "smoke sizes compile nothing"}
    assert "its interpreter" in providers["fused_beit, triton"]["absent"]
    machine = json.loads((tmp_path / "timed.json").read_text())["machine_info"]
    assert machine["versions"]["torch"]
    assert machine["processor"]
    assert machine["instruction_set"] in shown.stdout


def test_a_step_with_a_wrong_result_is_not_timed(root, tmp_path):
    """Each of its results is spoilt in test_benchmarks_step.py; here is what pytest makes of it."""
    plugin = SPOIL_STEP.format(provider="fused_beit", key="gradient of positions", factor=1.01)
    # Without transformers, which takes long to import.
    shown, timed = run_benchmarks(root, tmp_path, *STEP, plugin=plugin, absent="transformers")
    assert shown.returncode == 1
    assert "AssertionError: fused_beit: " in shown.stdout
    assert timed == []


@pytest.mark.slow
def test_a_peer_with_a_wrong_result_has_failed_in_its_row_and_the_others_are_timed(root, tmp_path):
    plugin = SPOIL_STEP.format(provider="transformers, eager", key="logits", factor=-1)
    shown, (timed,) = run_benchmarks(root, tmp_path, *STEP, plugin=plugin)
    assert shown.returncode == 0, shown.stdout[-3000:]
    assert "not timed: transformers, eager: wrong result: transformers, eager: logits: error 2.00e+00" in shown.stdout
    providers = timed["extra_info"]["providers"]
    assert providers["transformers, eager"]["failed"].startswith("wrong result: transformers, eager: logits: ")
    assert providers["transformers, sdpa"]["ratio"] > 0
    assert providers["fused_beit"]["median"] > 0


@pytest.mark.parametrize(
    ("file", "provider", "code"),
    [
        (ATTENTION, "sdpa", "found = found * 1.01"),
        (CODES, "matmul-max", "found = ((found[0] + 1) % 1024, found[1])"),
        pytest.param(LOSS, "auto", "found = (found[0], found[1] * 1.05)", marks=pytest.mark.slow),
    ],
    ids=["attention", "index", "accuracy"],
)
def test_an_operator_with_a_wrong_result_is_not_timed(root, tmp_path, file, provider, code):
    plugin = SPOIL_OPERATOR.format(provider=provider, code=code)
    shown, timed = run_benchmarks(root, tmp_path, file, "-k", "fp32", plugin=plugin)
    assert shown.returncode == 1
    assert f"{provider}: wrong result" in shown.stdout
    assert "exceeds" in shown.stdout
    assert timed == []


def test_an_operator_that_became_slow_fails_the_smoke_run(root, tmp_path):
    plugin = SPOIL_OPERATOR.format(provider="auto", code="time.sleep(0.05)")
    shown, _ = run_benchmarks(root, tmp_path, CODES, "-k", "fp32", plugin=plugin)
    assert shown.returncode == 1
    assert "times as long as matmul-max, more than the 3 times" in shown.stdout


def test_attention_is_compared_in_each_direction(root, tmp_path):
    shown, timed = run_benchmarks(root, tmp_path, ATTENTION, "-k", "fp32")
    assert shown.returncode == 0, shown.stdout[-3000:]
    assert len(timed) == 3
    for bench in timed:
        providers = bench["extra_info"]["providers"]
        assert "its interpreter" in providers["triton"]["absent"]
        assert providers["sdpa"]["gb_per_s"] > 0
        assert providers["reference"]["errors"]["grad bias"] < 1e-5
        assert "grad bias" not in providers["flash-no-bias"]["errors"]


def test_an_absent_peer_is_named_with_the_reason(root, tmp_path):
    shown, (timed,) = run_benchmarks(root, tmp_path, *STEP, absent="transformers")
    assert shown.returncode == 0, shown.stdout[-3000:]
    assert timed["extra_info"]["providers"]["transformers, sdpa"] == {"absent": "not installed"}
    assert "not installed" in shown.stdout
