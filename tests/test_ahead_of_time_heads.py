"""token_loss and nearest_code compiled for GPUs that are not here, and that their RESOURCES.md say what was found.

Triton compiles nothing in the tests' own process, which runs its interpreter, so all of this is asked of another.
"""

import functools
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

ROWS = ["K=8192 D=2048", "K=8192 D=32", "V=8192 mean", "V=8192 none", "V=8192 loss"]
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}

pytestmark = pytest.mark.xdist_group("ahead_of_time")  # so that one worker compiles, once


def without_interpreter(*command):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


@functools.cache
def check():
    only = [f"{arch} {row}" for arch in SHARED_LIMIT for row in ROWS]
    return without_interpreter("-m", "fused_beit.kernels.report", "--check", "--json", "--only", *only)


@pytest.fixture(scope="module")
def compiled():
    assert check().stdout, check().stderr
    return [json.loads(line) for line in check().stdout.splitlines()]


def test_every_kernel_is_among_them(compiled):
    assert {row["kernel"] for row in compiled if row["arch"] == "sm_90"} == {
        "nearest_code_kernel",
        "nearest_code_join_kernel",
        "token_loss_kernel",
        "token_loss_scale_kernel",
    }


def test_no_register_is_kept_in_memory(compiled):
    assert [row for row in compiled if row["stack"] or row["spills"]] == []


def test_shared_memory_is_within_the_limit_of_the_architecture(compiled):
    assert [row for row in compiled if row["shared"] > SHARED_LIMIT[row["arch"]]] == []


def test_no_sum_is_made_by_atomics(compiled):
    assert [row for row in compiled if row["atomics"]] == []


def test_sm_90_searches_codes_with_wgmma_and_tma(compiled):
    found = [row for row in compiled if (row["arch"], row["kernel"]) == ("sm_90", "nearest_code_kernel")]
    assert len(found) == 2
    for row in found:
        assert row["wgmma"] > 0 and row["tma"] > 0 and row["mma"] == 0, row


def test_the_tables_say_what_is_compiled():
    assert check().returncode == 0, check().stderr
