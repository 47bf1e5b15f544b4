"""What training on a CPU asks of the C library, and which processor it takes the one at hand for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_beit.engine import cpu

PAGES_OF_NEW_MEMORY = """
import resource, sys, torch
from fused_beit.engine.cpu import keep_freed_memory
if sys.argv[1] == "kept" and not keep_freed_memory():
    sys.exit("no mallopt")
torch.set_num_threads(1)
def step():
    held = [torch.empty(40 << 20, dtype=torch.uint8).fill_(1) for _ in range(4)]  # each too large to be kept by default
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages(how: str) -> int:
    command = [sys.executable, "-c", PAGES_OF_NEW_MEMORY, how]
    done = subprocess.run(command, capture_output=True, text=True)
    if "no mallopt" in done.stderr:
        pytest.skip("this C library has no mallopt")
    return int(done.stdout)


def test_a_step_reuses_the_memory_of_the_one_before():
    assert pages("kept") < pages("given back") / 10


OLDER, AVX2, AVX512, BF16, AMX = cpu.INSTRUCTION_SETS
TWO = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
FLAGS = "fma avx2"
FLAGS_512 = f"{FLAGS} avx512f avx512bw avx512dq avx512vl"
KINDS = {
    AVX2: (FLAGS, "AVX2", False),
    AVX512: (FLAGS_512, "AVX512", True),
    BF16: (f"{FLAGS_512} avx512_bf16", "AVX512", True),
    AMX: (f"{FLAGS_512} avx512_bf16 amx_bf16", "AVX512", True),
}
"""Processor -> its flags in /proc/cpuinfo, what torch's loops use, whether oneDNN says that it can bf16."""


@pytest.fixture
def processor(monkeypatch, tmp_path):
    """Stands in for a processor of a kind, without or with variables that limit it."""

    def processor(kind: str, **variables: str) -> None:
        flags, capability, onednn = KINDS[kind]
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : {flags} sse\n")
        for name in (*cpu._ONEDNN_VARIABLES, "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        capability = {"avx2": "AVX2"}.get(variables.get("ATEN_CPU_CAPABILITY", ""), capability)
        onednn = onednn and not variables.get("ONEDNN_MAX_CPU_ISA", "").startswith("AVX2")
        monkeypatch.setattr(cpu.platform, "machine", lambda: "x86_64")
        monkeypatch.setattr(cpu, "Path", lambda path: tmp_path / Path(path).name)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
        cpu._native.cache_clear()

    yield processor
    cpu._native.cache_clear()


@pytest.mark.parametrize(("kind", "fast"), [(AVX2, False), (AVX512, False), (BF16, True), (AMX, True)])
def test_only_a_processor_with_products_of_bf16_has_fast_ones(processor, kind, fast):
    processor(kind)  # AVX-512 alone imitates them, though oneDNN says that it supports bf16 there
    assert cpu.has_bf16() == fast
    assert cpu.instruction_set() == kind
    assert cpu.imitation() == ""


@pytest.mark.parametrize("kind", [AVX2, AVX512, BF16, AMX])
def test_two_variables_make_every_processor_one_with_avx2_alone(processor, kind):
    processor(kind, **TWO)
    assert not cpu.has_bf16()
    assert cpu.instruction_set() == AVX2
    imitated = cpu.imitation()
    if kind == AVX2:
        assert imitated == ""
    else:
        given = "ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2"
        assert imitated == (
            f"imitated by {given} on a processor with {kind}, but for products in fp32, which MKL makes"
        )


@pytest.mark.parametrize(
    ("variables", "fast", "name"),
    [
        ({"ATEN_CPU_CAPABILITY": "avx2"}, True, f"{AVX2}, in oneDNN {AMX}"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, False, f"{AVX512}, in oneDNN {AVX2}"),
        ({"ONEDNN_MAX_CPU_ISA": "avx512_core"}, False, AVX512),
        ({"DNNL_MAX_CPU_ISA": "AVX512_CORE_BF16"}, True, BF16),
        ({"ONEDNN_MAX_CPU_ISA": "DEFAULT"}, True, AMX),
    ],
)
def test_each_variable_limits_its_own_library(processor, variables, fast, name):
    processor(AMX, **variables)
    assert cpu.has_bf16() == fast
    assert cpu.instruction_set() == name
    assert (cpu.imitation() == "") == (name == AMX)


def test_products_of_mkl_have_a_variable_of_their_own(processor):
    processor(AMX, **TWO, MKL_ENABLE_INSTRUCTIONS="AVX2")
    assert cpu.imitation().endswith(f"MKL_ENABLE_INSTRUCTIONS=AVX2 on a processor with {AMX}")
    processor(AMX, MKL_ENABLE_INSTRUCTIONS="AVX2")
    assert cpu.instruction_set() == AMX
    assert cpu.imitation().startswith("imitated by MKL_ENABLE_INSTRUCTIONS=AVX2 on ")


def test_an_arm_processor_is_what_it_is_and_onednn_knows_of_its_bf16(processor, monkeypatch):
    processor(AVX512)
    monkeypatch.setattr(cpu.platform, "machine", lambda: "aarch64")
    assert cpu.has_bf16()
    assert (cpu.instruction_set(), cpu.imitation()) == ("aarch64", "")


def test_here_the_two_variables_leave_avx2_without_bf16():
    code = "from fused_beit.engine import cpu; print(cpu.has_bf16(), cpu.instruction_set(), sep='; ')"
    shown = subprocess.run([sys.executable, "-c", code], env=os.environ | TWO, capture_output=True, text=True)
    assert shown.stdout.strip() in (f"False; {AVX2}", f"False; {OLDER}", f"True; {cpu.platform.machine()}"), shown


def test_code_compiled_for_an_imitated_processor_lies_apart(monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    cpu.keep_compiled_code_apart()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    cpu.keep_compiled_code_apart()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"].endswith("torchinductor-avx2")
