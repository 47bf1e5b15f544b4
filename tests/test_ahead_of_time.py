"""The kernels compiled for GPUs that are not here: what they take of them, and that RESOURCES.md says so.

Triton compiles nothing in the tests' own process, which runs its interpreter, so all of this is asked of another.
"""

import functools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

BEIT_BASE = "N=197 D=64"
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}

pytestmark = pytest.mark.xdist_group("ahead_of_time")  # so that one worker compiles, once


def without_interpreter(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


@functools.cache
def check(*rows: str) -> subprocess.CompletedProcess[str]:
    only = ["--only", *rows] if rows else []
    return without_interpreter("-m", "fused_beit.kernels.report", "--check", "--json", *only)


@pytest.fixture(scope="module")
def checked():
    return check(f"sm_80 {BEIT_BASE}", f"sm_90 {BEIT_BASE}")


@pytest.fixture(scope="module")
def compiled(checked):
    """(arch, build) -> kernels of attention."""
    assert checked.stdout, checked.stderr
    found = {}
    for line in checked.stdout.splitlines():
        row = json.loads(line)
        if row["kernel"].startswith("attention"):
            found.setdefault((row["arch"], row["build"]), []).append(row)
    return found


BUILDS = [(arch, build) for arch in SHARED_LIMIT for build in ("in order", "atomics")]


@pytest.mark.parametrize("build", BUILDS, ids=" ".join)
def test_no_register_is_kept_in_memory(compiled, build):
    assert {
        row["kernel"]: (row["stack"], row["spills"]) for row in compiled[build] if row["stack"] or row["spills"]
    } == {}


@pytest.mark.parametrize("build", BUILDS, ids=" ".join)
def test_shared_memory_is_within_the_limit_of_the_architecture(compiled, build):
    assert max(row["shared"] for row in compiled[build]) <= SHARED_LIMIT[build[0]]


def test_sm_90_multiplies_with_wgmma_alone(compiled):
    for row in compiled["sm_90", "in order"]:
        assert row["wgmma"] > 0 and row["mma"] == 0, row


def test_sm_90_moves_tiles_with_tma(compiled):
    for row in compiled["sm_90", "in order"]:
        assert row["tma"] > 0, row


@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_every_kernel_is_compiled(compiled, arch):
    kernels = [row["kernel"] for row in compiled[arch, "in order"]]
    assert kernels == ["attention_fwd_kernel", "attention_bwd_q_kernel", "attention_bwd_kv_kernel"]


@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_a_deterministic_build_has_no_float_atomics(compiled, arch):
    assert [row["atomics"] for row in compiled[arch, "in order"] if row["atomics"]] == []


@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_a_build_without_an_order_has_float_atomics(compiled, arch):
    assert sum(row["atomics"] for row in compiled[arch, "atomics"]) > 0


def test_the_table_says_what_is_compiled(checked):
    assert checked.returncode == 0, checked.stderr


@pytest.mark.slow
def test_the_whole_table_says_what_is_compiled():
    result = check()
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [197, 577, 1025])
@pytest.mark.parametrize("options", ["has_mask=True", "has_mask=True, deterministic=False", "has_bias=False"])
def test_sm_90_keeps_no_register_in_memory_with_a_mask_or_without_a_bias(num_tokens, options):
    code = f"""
from fused_beit.kernels._triton.ahead_of_time import Case, compile_case
from fused_beit.kernels.rel_pos_attention.report_cases import launch_all
for kernel in compile_case(Case("sm_90", "", "", lambda: launch_all({num_tokens}, 64, {options}))):
    print(kernel.kernel, kernel.stack)
"""
    result = without_interpreter("-c", code)
    stacks = dict(line.split() for line in result.stdout.splitlines())
    assert stacks and set(stacks.values()) == {"0"}, stacks or result.stderr


def test_the_interpreter_is_refused_in_a_sentence():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "fused_beit.kernels.report", "--check"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert "unset TRITON_INTERPRET" in result.stderr.splitlines()[-1]


def test_code_that_cuobjdump_cannot_read_is_told_in_a_sentence(tmp_path, monkeypatch):
    """As that of Triton 3.6 cannot of sm_103."""
    from fused_beit.kernels._triton import ahead_of_time

    cuobjdump = tmp_path / "cuobjdump"
    cuobjdump.write_text("#!/bin/sh\necho \"nvdisasm fatal   : Cannot decode architecture 'SM103a'\" >&2\nexit 1\n")
    cuobjdump.chmod(0o755)
    monkeypatch.setattr(ahead_of_time, "CUOBJDUMP", cuobjdump)
    metadata = SimpleNamespace(name="x_kernel", num_warps=4, shared=0, target=SimpleNamespace(arch=103))
    with pytest.raises(
        RuntimeError, match=r"x_kernel for sm_103, but its cuobjdump cannot read .* 'SM103a'; that of a"
    ):
        ahead_of_time.resources(SimpleNamespace(asm={"cubin": b""}, metadata=metadata))


def test_a_kernel_that_was_given_no_tensor_memory_is_told():
    from fused_beit.kernels._triton.ahead_of_time import Case, Resources
    from fused_beit.kernels.report import Row

    fields = dict.fromkeys(Resources._fields, 0) | {"kernel": "a_kernel", "tensor_memory": 1440, "trapped": True}
    broken = Row(Case("sm_100", "N=5 D=8", "in order", print), Resources(**fields)).broken_rules()
    assert broken == ["more than the 512 columns of tensor memory that there are", "it does nothing but stop"]


def test_a_changed_row_is_told_before_and_after():
    from fused_beit.kernels.report import differences

    table = "| arch | shape | registers |\n|---|---|--:|\n| sm_80 | N=5 D=8 | 128 |\n| sm_90 | N=5 D=8 | 112 |\n"
    found = differences(table, ["| sm_90 | N=5 D=8 | 113 |"], only=["sm_90 N=5 D=8"])
    assert found == ["- | sm_90 | N=5 D=8 | 112 |", "+ | sm_90 | N=5 D=8 | 113 |"]


def test_a_row_that_nothing_compiles_any_more_is_told():
    from fused_beit.kernels.report import differences

    assert differences("| sm_80 | N=5 D=8 | 128 |\n", []) == ["- | sm_80 | N=5 D=8 | 128 |"]
