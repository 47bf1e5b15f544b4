"""cuDNN's attention by its own frontend (`nvidia-cudnn-frontend`, imported as `cudnn`), with the gradient of the bias.

torch calls cuDNN too, but gives a bias that needs a gradient to another kernel. The frontend has that gradient, and on
sm_90 it takes it together with the wish for a fixed order: cuDNN then writes dP of every picture, [B, H, N, N] rounded
up to whole tiles, and reduces it over the pictures. On sm_100 it refuses the two together.

https://docs.nvidia.com/deeplearning/cudnn/frontend/latest/operations/Attention.html

B pictures, H heads, N tokens, D channels of a head.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .attention import AttentionInputs
from .rounds import AbsentError


def frontend(device: torch.device) -> Any:
    """The module `cudnn`. Raises AbsentError where it is not installed or has no GPU of NVIDIA's."""
    try:
        cudnn = importlib.import_module("cudnn")
    except ImportError as error:
        raise AbsentError(f"cuDNN's frontend cannot be imported (pip install nvidia-cudnn-frontend): {error}") from None
    if device.type != "cuda" or torch.version.hip:
        raise AbsentError(f"cuDNN runs on GPUs of NVIDIA only, and the tensors are on {device.type}")
    return cudnn


class Graph:
    """A graph of cuDNN. It is described, then built once by `finish`, and run as often as is wanted."""

    def __init__(self, cudnn: Any, dtype: torch.dtype, **options: Any) -> None:
        self.cudnn = cudnn
        float32 = cudnn.data_type.FLOAT
        self.types = {
            torch.bfloat16: cudnn.data_type.BFLOAT16,
            torch.float16: cudnn.data_type.HALF,
            torch.float32: float32,
        }
        if dtype not in (torch.bfloat16, torch.float16):
            raise AbsentError(f"cuDNN's attention takes bfloat16 and float16, and not {dtype}")
        self.graph = cudnn.pygraph(
            io_data_type=self.types[dtype],
            intermediate_data_type=float32,
            compute_data_type=float32,
            **options,
        )

    def input(self, name: str, like: Tensor) -> Any:
        """An argument of the graph, of this shape and layout: what it reads, or dBias, which it writes."""
        return self.graph.tensor(
            name=name, dim=list(like.shape), stride=list(like.stride()), data_type=self.types[like.dtype]
        )

    def output(self, result: Any, like: Tensor) -> Any:
        result.set_output(True).set_dim(list(like.shape)).set_stride(list(like.stride()))
        return result.set_data_type(self.types[like.dtype])

    def finish(self) -> None:
        """Raises cuDNN's own error, with its reason, where it has no kernel for the graph."""
        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans([self.cudnn.heur_mode.A, self.cudnn.heur_mode.FALLBACK])
        self.graph.check_support()
        self.graph.build_plans()

    def run(self, handle: Any, tensors: dict[Any, Tensor]) -> None:
        """On the current stream, with a workspace that goes when it has run."""
        device = next(iter(tensors.values())).device
        workspace = torch.empty(self.graph.get_workspace_size(), dtype=torch.uint8, device=device)
        self.cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
        self.graph.execute(tensors, workspace, handle=handle)


class Graphs:
    """Forward and backward for the layouts of qkv [B, N, 3, H, D] and bias [H, N, N].

    options: of both graphs, to those that cuDNN's frontend has
    """

    def __init__(self, cudnn: Any, qkv: Tensor, bias: Tensor, **options: Any) -> None:
        self.handle = options.get("handle")
        scale = qkv.shape[-1] ** -0.5
        q, k, v = parts(qkv)
        out, stats = results_like(qkv)

        self.fwd = fwd = Graph(cudnn, qkv.dtype, **options)
        inputs = {name: fwd.input(name, tensor) for name, tensor in zip("qkv", (q, k, v), strict=True)}
        inputs["bias"] = fwd.input("bias", bias[None])
        found = fwd.graph.sdpa(**inputs, attn_scale=scale, generate_stats=True, name="attention")
        outputs = [fwd.output(result, like) for result, like in zip(found, (heads(out), stats), strict=True)]
        self.fwd_tensors = [*inputs.values(), *outputs]

        self.bwd = bwd = Graph(cudnn, qkv.dtype, **options)
        inputs = {name: bwd.input(name, tensor) for name, tensor in zip("qkv", (q, k, v), strict=True)}
        inputs |= {"o": bwd.input("o", heads(out)), "dO": bwd.input("dO", heads(out))}
        inputs |= {"stats": bwd.input("stats", stats), "bias": bwd.input("bias", bias[None])}
        inputs["dBias"] = bwd.input("dBias", packed_like(bias)[None])
        found = bwd.graph.sdpa_backward(
            **inputs, attn_scale=scale, use_deterministic_algorithm=True, name="attention_backward"
        )
        outputs = [bwd.output(result, like) for result, like in zip(found, (q, k, v), strict=True)]
        self.bwd_tensors = [*inputs.values(), *outputs]

    def finish(self) -> None:
        self.fwd.finish()
        self.bwd.finish()

    def forward(self, qkv: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """-> out [B, N, H, D] and the log-sum-exp of each row, [B, H, N, 1]."""
        out, stats = results_like(qkv)
        data = (*parts(qkv), bias[None], heads(out), stats)
        self.fwd.run(self.handle, dict(zip(self.fwd_tensors, data, strict=True)))
        return out, stats

    def backward(
        self, grad_out: Tensor, qkv: Tensor, bias: Tensor, out: Tensor, stats: Tensor
    ) -> tuple[Tensor, Tensor]:
        """-> gradients of qkv and bias."""
        grad_qkv, grad_bias = torch.empty_like(qkv), packed_like(bias)
        given = (*parts(qkv), heads(out), heads(grad_out.contiguous()), stats, bias[None])
        data = (*given, grad_bias[None], *parts(grad_qkv))
        self.bwd.run(self.handle, dict(zip(self.bwd_tensors, data, strict=True)))
        return grad_qkv, grad_bias


def parts(qkv: Tensor) -> tuple[Tensor, ...]:
    """q, k, v [B, H, N, D], views of qkv [B, N, 3, H, D]."""
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def heads(tensor: Tensor) -> Tensor:
    """[B, N, H, D] -> [B, H, N, D]"""
    return tensor.transpose(1, 2)


def packed_like(bias: Tensor) -> Tensor:
    """Room for the gradient of the bias. cuDNN 9.24 has no kernel that would leave room between its rows on sm_90."""
    return bias.new_empty(bias.shape)


def results_like(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Room for out [B, N, H, D] and the log-sum-exp of each row, [B, H, N, 1]."""
    batch, num_tokens, _, num_heads, head_dim = qkv.shape
    stats = qkv.new_empty(batch, num_heads, num_tokens, 1, dtype=torch.float32)
    return qkv.new_empty(batch, num_tokens, num_heads, head_dim), stats


class Attend(torch.autograd.Function):
    """The graphs under autograd."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor, graphs: Graphs) -> Tensor:
        out, stats = graphs.forward(qkv, bias)
        ctx.save_for_backward(qkv, bias, out, stats)
        ctx.graphs = graphs
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        return *ctx.graphs.backward(grad_out, *ctx.saved_tensors), None


def attention(inputs: AttentionInputs) -> tuple[Callable[[], Tensor], str]:
    """-> the call of the provider, which gives [B, N, H*D], and the versions that it is made by."""
    cudnn = frontend(inputs.device)
    graphs = Graphs(cudnn, inputs.qkv, inputs.bias, handle=cudnn.create_handle())
    graphs.finish()
    versions = f"cuDNN {cudnn.backend_version_string()}, frontend {cudnn.__version__}"
    return lambda: Attend.apply(inputs.qkv, inputs.bias, graphs).flatten(2), versions
