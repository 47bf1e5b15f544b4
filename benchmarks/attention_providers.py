"""Who computes attention with the shared bias: ours, other tiles of ours, what people would use instead, and bounds.

The bounds are attention without the bias, or with one that gets no gradient.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fused_beit.kernels import SharedBias, attention_plan, rel_pos_attention, relative_position_index, resolve
from fused_beit.kernels._triton.target import arch_of
from fused_beit.kernels.rel_pos_attention.plan import Plan, Tile, pinned

from . import attention_cudnn
from .attention import NO_BIAS, ON_CPU, ON_GPU, REHEARSAL, SMOKE, AttentionInputs, heads_apart, leaf
from .cases import Work
from .providers import BOUND, CANDIDATE, OURS, PEER, Operator, Provider, compile_for, refuse_the_interpreter, what_runs
from .rounds import AbsentError, Outputs


@dataclass(frozen=True)
class AttentionWork(Work):
    """Work whose gradient of the bias may be added to a buffer instead."""

    buffer: Tensor | None = None

    def backward(self, output: Any) -> tuple[Tensor | None, ...]:
        with self.around():
            return self._grads(output, allow_unused=self.buffer is not None)

    def results(self) -> Outputs:
        if self.buffer is None:
            return super().results()
        self.buffer.zero_()
        found = dict(super().results())
        assert found["grad bias"] is None, "the gradient of the bias went to autograd and not only into the buffer"
        return found | {"grad bias": self.buffer.clone()}


def attention_work(
    inputs: AttentionInputs,
    call: Callable[[], Tensor],
    leaves: dict[str, Tensor],
    grad_out: Tensor | None = None,
    **options: Any,
) -> AttentionWork:
    grad_out = inputs.grad_out if grad_out is None else grad_out
    return AttentionWork(inputs.case, call, inputs.case.outputs, leaves, lambda number, output: grad_out, **options)


def packed(
    impl: str,
    inputs: AttentionInputs,
    *,
    bias: Tensor | None = None,
    rounded_bias: Tensor | None = None,
    compiled: bool = False,
    **options: Any,
) -> Work:
    """`rel_pos_attention` by one of its implementations, on qkv as the linear gives it."""
    plan = what_runs(inputs.case, impl, inputs.device)
    bias = inputs.bias if bias is None else bias

    def attend(qkv: Tensor, bias: Tensor) -> Tensor:
        shared = bias if rounded_bias is None else SharedBias(bias, rounded_bias)
        return rel_pos_attention(qkv, shared, impl=impl, **options)

    if compiled:
        attend = compile_for(inputs.device, attend)
    leaves = {"qkv": inputs.qkv, "bias": bias}
    return attention_work(
        inputs, lambda: attend(inputs.qkv, bias), leaves, buffer=options.get("accumulate_into"), plan=plan
    )


def apart(inputs: AttentionInputs, bias: Tensor | None, backend: SDPBackend | None = None) -> Work:
    """torch's own attention on q, k, v that are contiguous each, as no model has them but every benchmark does."""
    q, k, v = inputs.apart
    mask = None if bias is None else bias[None]
    leaves = {"q": q, "k": k, "v": v} | ({} if bias is None or not bias.requires_grad else {"bias": bias})

    def call() -> Tensor:
        with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def arrange(found: Outputs) -> Outputs:
        parts = [found[f"grad {name}"] for name in "qkv"]
        others = {name: value for name, value in found.items() if name not in ("grad q", "grad k", "grad v")}
        output = found["output"].transpose(1, 2).flatten(2)
        return others | {"output": output, "grad qkv": torch.stack(parts).permute(1, 3, 0, 2, 4)}

    grad_out = heads_apart(inputs.grad_out, inputs.case.num_heads)
    return attention_work(inputs, call, leaves, grad_out, arrange=arrange)


def flex_table(inputs: AttentionInputs) -> Work:
    """FlexAttention that looks the bias up in its table: no [H, N, N] at all, and the gradient is the table's."""
    resolve("rel_pos_attention", "flex", inputs.device)
    if inputs.device.type == "cpu":
        raise AbsentError("FlexAttention has no backward on a CPU")
    from torch.nn.attention.flex_attention import flex_attention

    table, index = inputs.table, relative_position_index(inputs.case.window).to(inputs.device)
    attend = torch.compile(flex_attention, dynamic=False)

    def add_bias(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + table[index[query, key], h]

    def call() -> Tensor:
        q, k, v = inputs.qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return attend(q, k, v, score_mod=add_bias).transpose(1, 2).flatten(2)

    return attention_work(inputs, call, {"qkv": inputs.qkv, "table": table})


def ours(
    inputs: AttentionInputs,
    change: Callable[[Plan], Plan] | None = None,
    accumulate: bool = False,
    shared: bool = False,
    deterministic: bool = True,
) -> Work:
    """The Triton kernels, as they are or by another plan."""
    refuse_the_interpreter(inputs.case, inputs.device)
    options: dict[str, Any] = {"deterministic": deterministic}
    if accumulate:
        options["accumulate_into"] = torch.zeros(inputs.bias.shape, dtype=torch.float32, device=inputs.device)
    if shared:
        options |= {"bias": leaf(inputs.bias.float()), "rounded_bias": inputs.bias.detach()}
    work = packed("triton", inputs, **options)
    default = default_plan(inputs)
    plan = default if change is None else change(default)
    if change is not None and plan == default:
        raise AbsentError("is what triton does in this case")
    if change is not None or inputs.case.rehearsal:
        work = replace(work, around=partial(pinned, plan))
    return replace(work, plan=str(plan))


def default_plan(inputs: AttentionInputs) -> Plan:
    """What the kernels do by themselves; in a rehearsal, what they would do on an H100 with heads of 64 channels."""
    case = inputs.case
    if case.rehearsal:
        return attention_plan("sm_90", 64, case.dtype)
    return attention_plan(arch_of(inputs.device), case.head_dim, case.dtype)


def batch_loop(inputs: AttentionInputs) -> Work:
    """Our kernels, but the gradient of the bias by a kernel that loops over the pictures."""
    refuse_the_interpreter(inputs.case, inputs.device)
    what_runs(inputs.case, "triton", inputs.device)
    from .attention_batch_loop import attend, tile_for

    plan = default_plan(inputs)
    tile = tile_for(inputs.case.dtype)
    return attention_work(
        inputs,
        lambda: attend(inputs.qkv, inputs.bias),
        {"qkv": inputs.qkv, "bias": inputs.bias},
        around=partial(pinned, plan),
        plan=f"{plan}, of the bias {tile.block_m}x{tile.block_n} by {tile.num_warps} warps",
    )


def cudnn_frontend(inputs: AttentionInputs) -> Work:
    call, versions = attention_cudnn.attention(inputs)
    return attention_work(inputs, call, {"qkv": inputs.qkv, "bias": inputs.bias}, plan=versions)


def with_tiles(**tiles: Tile) -> Callable[[AttentionInputs], Work]:
    return partial(ours, change=lambda plan: plan._replace(**tiles))


# What lost at 197 tokens on an H100; more tokens may want larger tiles, and were not timed there.
LARGE = Tile(64, 64, 4, 2)
CANDIDATES = {
    "triton-forward-64x64": Provider(CANDIDATE, "forward tiles 64x64, 4 warps", with_tiles(forward=LARGE)),
    "triton-backward-64x64": Provider(
        CANDIDATE, "backward tiles 64x64, 4 warps", with_tiles(backward_q=LARGE, backward_kv=LARGE)
    ),
}

# The first is what all others are compared with; what compiles for long comes last.
PROVIDERS = {
    "triton": Provider(OURS, "the default: gradient of the bias in a fixed order", ours),
    "triton-any-order": Provider(OURS, "deterministic=False", partial(ours, deterministic=False)),
    "triton-shared": Provider(OURS, "an fp32 bias, rounded before: as layers share it", partial(ours, shared=True)),
    "triton-accumulate": Provider(OURS, "accumulate_into", partial(ours, accumulate=True)),
    **CANDIDATES,
    "auto": Provider(OURS, "what runs where nothing is asked for", partial(packed, "auto")),
    "sdpa": Provider(PEER, "torch's, on qkv, rows of the bias aligned", partial(packed, "sdpa")),
    "sdpa-unaligned": Provider(
        PEER, "the same, rows not aligned", lambda inputs: packed("sdpa", inputs, bias=inputs.unaligned_bias)
    ),
    "sdpa-apart": Provider(PEER, "torch's, on contiguous q, k, v", lambda inputs: apart(inputs, inputs.bias)),
    "flash-no-bias": Provider(
        BOUND,
        "torch's flash kernel, on contiguous q, k, v, without a bias",
        lambda inputs: apart(inputs, None, SDPBackend.FLASH_ATTENTION),
        variant=NO_BIAS,
    ),
    "cudnn-frozen-bias": Provider(
        BOUND,
        "cuDNN, on contiguous q, k, v, the bias without a gradient",
        lambda inputs: apart(inputs, inputs.bias.detach(), SDPBackend.CUDNN_ATTENTION),
    ),
    "cudnn-frontend": Provider(PEER, "cuDNN by its frontend, gradient of the bias in a fixed order", cudnn_frontend),
    # Not a peer: its forward is ours, and so are two of its three backward kernels.
    "batch-loop": Provider(CANDIDATE, "TriFast's scheme: a third kernel that sums dS over the pictures", batch_loop),
    "xformers": Provider(PEER, "its CUTLASS kernel, on qkv", partial(packed, "xformers")),
    "reference": Provider(PEER, "eager torch", partial(packed, "reference")),
    "compiled": Provider(PEER, "eager torch by torch.compile", partial(packed, "reference", compiled=True)),
    "flex-dense": Provider(PEER, "FlexAttention, dense bias", partial(packed, "flex", deterministic=False)),
    "flex-table": Provider(PEER, "FlexAttention, bias from the table", flex_table),
}

OPERATOR = Operator("rel_pos_attention", PROVIDERS, ON_GPU, ON_CPU, SMOKE, REHEARSAL, written_out="sdpa-apart")
OPERATORS = (OPERATOR,)
