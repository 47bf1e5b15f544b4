"""The kernels of masked pictures compiled for GPUs that are not here: what they take, and that RESOURCES.md says so."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

pytestmark = pytest.mark.xdist_group("ahead_of_time")  # so that one worker compiles, once

PLACES = ("embed", "keep", "restore")
ROWS = [f"{arch} {what} D=768 x=bf16" for arch in ("sm_80", "sm_90") for what in (*PLACES, "gather", "rows")]
ROWS += [f"sm_86 {what} D=64 P=4096 x=bf16" for what in ("embed", "gather")]
SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_90": 227}


@pytest.fixture(scope="module")
def checked():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fused_beit.kernels.report", "--check", "--json", "--only", *ROWS]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def compiled(checked):
    assert checked.stdout, checked.stderr
    return [json.loads(line) for line in checked.stdout.splitlines()]


def test_one_pass_forward_one_backward_and_one_over_the_partial_sums(compiled):
    for row in ROWS:
        kernel = "place" if any(place in row for place in PLACES) else "gather"
        passes = ("fwd", "bwd") if "rows" in row else ("fwd", "bwd", "sums")  # they have no parameters
        found = [one["kernel"] for one in compiled if f"{one['arch']} {one['shape']}" == row]
        assert found == [f"{kernel}_{name}_kernel" for name in passes]


def test_no_register_is_kept_in_memory(compiled):
    assert [row for row in compiled if row["stack"] or row["spills"]] == []


def test_sums_have_an_order(compiled):
    assert [row for row in compiled if row["atomics"]] == []


def test_shared_memory_is_within_the_limit_of_the_architecture(compiled):
    assert [row for row in compiled if row["shared"] > SHARED_KIB[row["arch"]] * 1024] == []


def test_two_programs_of_the_backward_are_at_work_on_a_multiprocessor_at_once(compiled):
    """As many as PROGRAMS counts on: fewer would leave the last ones for a second round."""
    assert min(row["programs_a_processor"] for row in compiled if "_bwd_" in row["kernel"]) >= 2


def test_the_table_says_what_is_compiled(checked):
    assert checked.returncode == 0, checked.stderr
