"""Who attention is timed against: each computes what it is compared in, and says why where it cannot run."""

import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from benchmark_modules import benchmark

from fused_beit.kernels import rel_pos_attention
from fused_beit.kernels.testing import rel_pos_attention_inputs


def rehearsed(dtype: torch.dtype, **sizes: int) -> Any:
    return replace(benchmark("attention").REHEARSAL[0], dtype=dtype, **sizes)


def checked(case: Any, *names: str, device: str = "cpu") -> Any:
    providers = {name: benchmark("attention_providers").PROVIDERS[name] for name in names}
    return benchmark("measuring").check_providers(case, providers, torch.device(device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_sum_over_pictures_in_a_kernel_of_its_own_keeps_the_rule(dtype):
    pytest.importorskip("triton")
    found = checked(rehearsed(dtype, side=6, batch=3), "batch-loop")
    assert (found.failed, found.absent) == ({}, {})
    assert found.errors["batch-loop"].keys() == {"output", "grad qkv", "grad bias"}


def test_a_sum_over_pictures_is_exact_in_float64():
    pytest.importorskip("triton")
    inputs = rel_pos_attention_inputs(3, 37, 1, 16, dtype=torch.float64)
    leaves = [inputs[name].requires_grad_() for name in ("qkv", "bias")]
    out = benchmark("attention_batch_loop").attend(*leaves)
    expected = rel_pos_attention(*leaves, impl="reference")
    cotangent = torch.randn_like(out)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    found, exact = (torch.autograd.grad(output, leaves, cotangent) for output in (out, expected))
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


COMPILE = """
import sys, torch
sys.path.insert(0, {root!r})
from benchmarks.attention_batch_loop import bias_grad
from fused_beit.kernels._triton.ahead_of_time import Case, compile_case

def launch():
    q, k, v = torch.empty(8, 197, 3, 12, 64, dtype=torch.bfloat16, device="meta").permute(2, 0, 3, 1, 4)
    bias = torch.empty(12, 197, 197, dtype=torch.bfloat16, device="meta")
    lse = torch.empty(8, 12, 197, device="meta")
    bias_grad(q, k, v, bias, q, lse, lse, bias)

(kernel,) = compile_case(Case("sm_90", "", "", launch))
print(kernel.stack, kernel.spills, kernel.atomics, kernel.mma, kernel.wgmma > 0, kernel.tma > 0)
print(kernel.programs_a_processor)
"""


@pytest.mark.slow
def test_a_sum_over_pictures_is_compiled_for_sm_90_without_a_stack_or_an_atomic(root):
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE.format(root=str(root))]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert shown.stdout.split("\n")[:2] == ["0 0 0 0 True True", "3"], shown.stderr[-2000:]


def test_without_its_frontend_or_a_gpu_cudnn_is_absent_with_the_reason(monkeypatch):
    (case,) = [case for case in benchmark("attention").SMOKE if case.dtype is torch.float32]
    monkeypatch.setitem(sys.modules, "cudnn", None)
    assert (
        checked(case, "cudnn-frontend")
        .absent["cudnn-frontend"]
        .startswith("cuDNN's frontend cannot be imported (pip install nvidia-cudnn-frontend): ")
    )
    monkeypatch.setitem(sys.modules, "cudnn", SimpleNamespace())
    why = "cuDNN runs on GPUs of NVIDIA only, and the tensors are on cpu"
    assert checked(case, "cudnn-frontend").absent == {"cudnn-frontend": why}


@dataclass(eq=False)
class Described:
    """A tensor of a graph."""

    dim: list[int] = field(default_factory=list)
    stride: list[int] = field(default_factory=list)
    data_type: str = ""

    def set_output(self, value: bool) -> "Described":
        assert value
        return self

    def set_dim(self, dim: list[int]) -> "Described":
        self.dim = dim
        return self

    def set_stride(self, stride: list[int]) -> "Described":
        self.stride = stride
        return self

    def set_data_type(self, data_type: str) -> "Described":
        self.data_type = data_type
        return self


class StandIn:
    """cuDNN's frontend as far as it is used, which computes in eager torch what a graph asks for."""

    data_type = SimpleNamespace(BFLOAT16="torch.bfloat16", HALF="torch.float16", FLOAT="torch.float32")
    heur_mode = SimpleNamespace(A="A", FALLBACK="FALLBACK")

    __version__ = "1.32.0"

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.streams: list[int] = []

    def backend_version_string(self) -> str:
        return "9.24.0"

    def create_handle(self) -> str:
        return "handle"

    def set_stream(self, handle: str, stream: int) -> None:
        self.streams.append(stream)

    def pygraph(self, **options: Any) -> Any:
        return StandInGraph(self)


class StandInGraph:
    def __init__(self, cudnn: StandIn) -> None:
        self.cudnn = cudnn
        self.built = mock.Mock()
        for step in ("validate", "build_operation_graph", "create_execution_plans", "check_support", "build_plans"):
            setattr(self, step, getattr(self.built, step))

    def tensor(self, name: str, dim: list[int], stride: list[int], data_type: str) -> Described:
        return Described(dim, stride, data_type)

    def sdpa(self, **asked: Any) -> tuple[Described, ...]:
        return self.remember(asked, 2)

    def sdpa_backward(self, **asked: Any) -> tuple[Described, ...]:
        return self.remember(asked, 3)

    def remember(self, asked: dict[str, Any], results: int) -> tuple[Described, ...]:
        self.cudnn.asked.append(asked)
        self.asked = asked
        self.results = tuple(Described() for _ in range(results))
        return self.results

    def get_workspace_size(self) -> int:
        assert self.built.build_plans.called
        return 1

    def execute(self, tensors: dict[Described, torch.Tensor], workspace: torch.Tensor, handle: str) -> None:
        assert handle == "handle"
        for described, tensor in tensors.items():
            assert described.dim == list(tensor.shape)
            assert described.stride == list(tensor.stride())
            assert described.data_type == str(tensor.dtype)

        def of(name: str) -> torch.Tensor:
            return tensors[self.asked[name]]

        leaves = [of(name).float().requires_grad_() for name in ("q", "k", "v", "bias")]
        q, k, v, bias = leaves
        with torch.enable_grad():
            scores = self.asked["attn_scale"] * q @ k.mT + bias
            out = scores.softmax(-1) @ v
        outputs = [tensors[result] for result in self.results]
        if "dO" not in self.asked:
            found, to = (out.detach(), scores.detach().logsumexp(-1, keepdim=True)), outputs
        else:
            torch.testing.assert_close(of("o").float(), out, rtol=1e-2, atol=1e-2)
            found = torch.autograd.grad(out, leaves, of("dO").float())
            to = [*outputs, of("dBias")]
        for value, tensor in zip(found, to, strict=True):
            tensor.copy_(value)


def test_cudnn_is_asked_for_the_gradient_of_a_shared_bias_in_a_fixed_order(monkeypatch):
    cudnn, attention_cudnn = StandIn(), benchmark("attention_cudnn")
    monkeypatch.setattr(attention_cudnn, "frontend", lambda device: cudnn)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: mock.Mock(cuda_stream=7))
    case = rehearsed(torch.float16, side=4, num_heads=2)
    found = checked(case, "cudnn-frontend")
    assert (found.failed, found.absent) == ({}, {})
    assert found.works["cudnn-frontend"].plan == "cuDNN 9.24.0, frontend 1.32.0"
    assert found.errors["cudnn-frontend"].keys() == {"output", "grad qkv", "grad bias"}
    forward, backward = cudnn.asked
    assert forward["generate_stats"] and forward["attn_scale"] == 16**-0.5
    assert backward["use_deterministic_algorithm"]
    assert forward["bias"].dim == backward["dBias"].dim == [1, 2, 17, 17]
    assert forward["q"].stride == [17 * 3 * 2 * 16, 16, 3 * 2 * 16, 1], "q is not taken from where the linear leaves it"
    assert forward["bias"].stride[2] == 32, "the rows of the bias are not aligned"
    assert backward["dBias"].stride == [2 * 17 * 17, 17 * 17, 17, 1], "cuDNN has no kernel for other rows"
    assert cudnn.streams == [7, 7]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["batch-loop", "cudnn-frontend"])
def test_on_a_gpu_it_keeps_the_rule_at_the_size_of_beit_base(name):
    found = checked(replace(benchmark("attention").ON_GPU[0], batch=16), name, device="cuda")
    assert found.failed == {}
    if found.absent:
        pytest.skip(found.absent[name])


def test_cudnn_is_not_asked_in_fp32():
    with pytest.raises(benchmark("rounds").AbsentError, match="takes bfloat16 and float16, and not"):
        benchmark("attention_cudnn").Graph(StandIn(), torch.float32)
