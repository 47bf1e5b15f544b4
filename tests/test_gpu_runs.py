"""Which tests run where there is a GPU, or no deepspeed: pytest itself, with our conftest.py, on a few lines of tests.

The GPU is one that torch is made to speak of; nothing runs on it.
"""

import os
import shlex
import shutil
import sys

import pytest
import torch

from fused_beit.kernels._triton import target

pytest_plugins = ["pytester"]

TESTS = """
import os, warnings
import pytest

interpreted = os.environ.get("TRITON_INTERPRET") == "1"

@pytest.mark.gpu
def test_on_a_gpu():
    assert not interpreted

@pytest.mark.gpu
@pytest.mark.slow
def test_that_warns():
    warnings.warn("of a version of torch")

@pytest.mark.skipif(not interpreted, reason="needs Triton's interpreter")
def test_in_the_interpreter():
    pass
"""
BY_EXPRESSION_OR_NAME = pytest.mark.parametrize(
    "selection",
    [
        "",
        "-m gpu",
        "-m 'gpu and not slow'",
        "-m 'not slow'",
        "-k on_a_gpu",
        "test_few.py",
        "test_few.py::test_on_a_gpu",
    ],
)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os.path, "exists", lambda path, exists=os.path.exists: path != "/dev/nvidia0" and exists(path))


@pytest.fixture
def run(root, pytester, monkeypatch):
    """Run pytest in a folder of its own; returns its result."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    shutil.copy(root / "tests" / "conftest.py", pytester.path)
    pytester.makeini("[pytest]\nmarkers =\n  gpu\n  slow\naddopts = -ra -p no:xdist\nfilterwarnings = error")
    pytester.makepyfile(test_few=TESTS)
    return lambda *arguments: pytester.runpytest_inprocess(*arguments)


@BY_EXPRESSION_OR_NAME
def test_on_a_gpu_its_tests_run_compiled_however_they_are_selected(run, gpu, selection):
    result = run(*shlex.split(selection))
    assert result.ret == 0
    assert result.parseoutcomes()["passed"] >= 1
    assert "failed" not in result.parseoutcomes()


def test_on_a_gpu_tests_in_the_interpreter_are_skipped_with_the_reason(run, gpu):
    run().stdout.fnmatch_lines(["SKIPPED*: needs Triton's interpreter"])


def test_on_a_gpu_the_interpreter_runs_its_tests_when_asked(run, gpu, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = run("-m", "not gpu")
    assert result.ret == 0
    result.assert_outcomes(passed=1, deselected=2)


def test_on_a_gpu_a_warning_fails_no_test(run, gpu):
    result = run("-m", "gpu")
    result.assert_outcomes(passed=2, deselected=1, warnings=1)
    result.stdout.fnmatch_lines(["*UserWarning: of a version of torch"])


@BY_EXPRESSION_OR_NAME
def test_without_a_gpu_its_tests_are_skipped_and_the_interpreter_is_on(run, no_gpu, selection):
    result = run(*shlex.split(selection))
    assert result.ret == 0
    result.stdout.fnmatch_lines(["SKIPPED*: needs an NVIDIA GPU; torch finds none here"])
    assert os.environ["TRITON_INTERPRET"] == "1"


@pytest.mark.parametrize("selection", ["", "-m gpu", "-m 'gpu and not slow'", "test_few.py::test_on_a_gpu"])
def test_a_run_that_skips_all_tests_for_the_gpu_that_is_there_fails(run, gpu, monkeypatch, selection):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = run(*shlex.split(selection))
    assert result.ret == 1
    result.stdout.fnmatch_lines(["error: this machine has a GPU, and all ? tests for one were skipped: needs Triton *"])


def test_so_does_one_with_a_torch_that_does_not_find_the_gpu(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os.path, "exists", lambda path, exists=os.path.exists: path == "/dev/nvidia0" or exists(path))
    result = run("-m", "gpu")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["error: this machine has a GPU, and all 2 *: needs an NVIDIA GPU; torch finds none*"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run("-m", "gpu").ret == 0


def test_a_run_without_tests_for_a_gpu_is_as_everywhere(run, gpu):
    assert run("-m", "not gpu").ret == 0


@pytest.fixture
def failing_interpreter(monkeypatch):
    monkeypatch.setattr(target, "installed", lambda: True)
    monkeypatch.setattr(target, "why_not_interpreted", lambda: "the interpreter fails; it needs another NumPy")


def test_a_run_asked_for_an_interpreter_that_cannot_work_stops_in_a_sentence(run, failing_interpreter, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert [line for line in result.errlines if line] == [
        "ERROR: the interpreter fails; it needs another NumPy, or TRITON_INTERPRET=0, which leaves its tests out"
    ]


def test_one_that_was_not_asked_leaves_its_tests_out(run, no_gpu, failing_interpreter):
    run().assert_outcomes(skipped=3)
    assert os.environ.get("TRITON_INTERPRET") is None


@pytest.fixture
def file_of_the_engine(pytester):
    """Of tests that need what is not installed here, as deepspeed, without which no test of the engine can run."""
    pytester.makepyfile(test_engine="import deepspeed_that_is_absent\ndef test_it(): pass")


def test_where_torch_and_triton_are_alone_the_engines_tests_are_skipped(run, gpu, file_of_the_engine, monkeypatch):
    monkeypatch.setattr(sys, "prefix", os.getcwd())
    result = run("-m", "gpu")
    assert result.ret == 0
    result.assert_outcomes(passed=2, skipped=1, deselected=1, warnings=1)
    result.stdout.fnmatch_lines(["SKIPPED*test_engine.py: needs deepspeed_that_is_absent, which is not installed here"])


def test_in_an_environment_that_make_completed_they_fail(run, gpu, file_of_the_engine, monkeypatch, tmp_path):
    (tmp_path / "installed").touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    result = run("-m", "gpu")
    assert result.ret == 2
    result.stdout.fnmatch_lines(["*No module named 'deepspeed_that_is_absent'"])


@pytest.mark.parametrize("module", ["fused_beit.absent", "benchmarks.absent", "test_few.absent"])
def test_what_is_missing_of_our_own_fails_everywhere(run, gpu, pytester, monkeypatch, module):
    monkeypatch.setattr(sys, "prefix", os.getcwd())
    pytester.makepyfile(test_engine=f"import {module}")
    assert run("-m", "gpu").ret == 2
