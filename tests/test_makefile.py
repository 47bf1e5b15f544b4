"""Which Python `make` takes, and what it leaves behind, with a program that stands in for Python."""

import os
import shutil
import subprocess

import pytest

# As `python -m venv`, `-m pip`, or a check by `-c`, of its version or, with names, of modules.
PYTHON = """#!/bin/sh
echo "$@" >> calls
case "$1 $2" in
"-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip") exit "$PIP_FAILS" ;;
"-c "*) [ -z "$3" ] || exit "$MODULES_MISSING" ;;
*) echo "$0 with $PYTHONPATH" ;;
esac
"""
GPU_TARGETS = pytest.mark.parametrize("target", ["test-gpu", "sanitize", "bench-gpu"])


@pytest.fixture
def make(root, tmp_path):
    """Run make in a folder with what its environments depend on; returns the process."""
    for name in ("Makefile", "setup.py", "pyproject.toml", "constraints-cpu.txt"):
        shutil.copy(root / name, tmp_path)
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def make(target, *, network=True, torch=True, **environment):
        facts = {"PIP_FAILS": str(int(not network)), "MODULES_MISSING": str(int(not torch))}
        outer = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MAKEFLAGS", "BIN")}
        command = ["make", target, f"PYTHON={python}"]
        return subprocess.run(
            command, cwd=tmp_path, env=outer | facts | environment, capture_output=True, text=True, timeout=60
        )

    return make


def calls(folder):
    return (folder / "calls").read_text()


def environment(folder, name=".venv", *, complete):
    """An environment that was made before; the program stands in for its Python too."""
    (folder / name / "bin").mkdir(parents=True)
    shutil.copy(folder / "python", folder / name / "bin" / "python")
    if complete:
        (folder / name / "installed").touch()


@pytest.mark.parametrize("name", [".venv", ".venv-peers"])
def test_an_install_that_fails_leaves_no_half_environment(make, tmp_path, name):
    shown = make(name, network=False)
    assert shown.returncode != 0
    assert f"error: {name} could not be installed; the message of pip is above" in shown.stderr
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", [".venv", ".venv-peers"])
def test_an_install_that_succeeds_is_marked_as_complete(make, tmp_path, name):
    assert make(name).returncode == 0
    assert (tmp_path / name / "installed").exists()


def test_an_update_that_fails_leaves_the_environment_as_it_was(make, tmp_path):
    environment(tmp_path, complete=True)
    os.utime(tmp_path / ".venv" / "installed", (0, 0))
    assert make(".venv", network=False).returncode != 0
    assert (tmp_path / ".venv" / "installed").exists()


@GPU_TARGETS
@pytest.mark.parametrize("half", [False, True], ids=["no environment", "half an environment"])
def test_on_a_gpu_the_python_with_torch_is_taken_and_nothing_is_installed(make, tmp_path, target, half):
    if half:
        environment(tmp_path, complete=False)
    shown = make(target, network=False)
    assert shown.returncode == 0, shown.stderr
    assert f"{tmp_path}/python with {tmp_path}/build/types\n" in shown.stdout
    assert "-m pip" not in calls(tmp_path)
    assert (tmp_path / ".venv").exists() == half


@GPU_TARGETS
def test_a_complete_environment_is_taken_first(make, tmp_path, target):
    environment(tmp_path, complete=True)
    assert f".venv/bin/python with {tmp_path}/build/types\n" in make(target, network=False).stdout


@GPU_TARGETS
def test_without_torch_an_environment_is_made(make, tmp_path, target):
    assert f".venv/bin/python with {tmp_path}/build/types\n" in make(target, torch=False).stdout
    assert (tmp_path / ".venv" / "installed").exists()


@GPU_TARGETS
def test_without_torch_and_network_the_install_fails(make, tmp_path, target):
    shown = make(target, torch=False, network=False)
    assert shown.returncode != 0
    assert " with " not in shown.stdout
    assert not (tmp_path / ".venv").exists()


@GPU_TARGETS
def test_an_environment_that_was_asked_for_must_be_complete(make, tmp_path, target):
    environment(tmp_path, ".venv-peers", complete=False)
    shown = make(target, MAKEFLAGS="BIN=.venv-peers/bin")
    assert shown.returncode != 0
    assert "error: there is no complete environment at .venv-peers/bin/.." in shown.stderr


@GPU_TARGETS
def test_a_pythonpath_of_the_callers_is_kept_after_ours(make, tmp_path, target):
    shown = make(target, PYTHONPATH="/wheels:/more")
    assert f"/python with {tmp_path}/build/types:/wheels:/more\n" in shown.stdout


@GPU_TARGETS
def test_fused_beit_is_found_without_an_install(make, root, tmp_path, target):
    make(target)
    for part in ("kernels", "engine", "ds_configs"):
        link = tmp_path / "build" / "types" / "fused_beit" / part
        assert link.is_symlink()
        assert (link.parent / link.readlink()).resolve() == tmp_path / part
