"""Who computes attention with the shared bias: ours, other tiles of ours, what people would use instead, and bounds.

The bounds are attention without the bias, or with one that gets no gradient.
"""

import contextlib
from collections.abc import Callable, Iterator
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
from .attention import NO_BIAS, ON_CPU, ON_GPU, REHEARSAL, SMOKE, AttentionCase, AttentionInputs, heads_apart, leaf
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
    pictures: int | None = None,
    accumulate: bool = False,
    shared: bool = False,
    deterministic: bool = True,
) -> Work:
    """The Triton kernels, as they are or by another plan, or with dS of so many pictures at a time; of one where that
    is rehearsed."""
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
    workspace = None if pictures is None else workspace_of(inputs.case, 1 if inputs.case.rehearsal else pictures)

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if change is not None or inputs.case.rehearsal:
                stack.enter_context(pinned(plan))
            if workspace is not None:
                stack.enter_context(workspace())
            yield

    return replace(work, around=around, plan=str(plan))


def default_plan(inputs: AttentionInputs) -> Plan:
    """What the kernels do by themselves; in a rehearsal, what they would do on an H100 with 197 tokens."""
    case = inputs.case
    if case.rehearsal:
        return attention_plan("sm_90", 197, 64, case.dtype)
    return attention_plan(arch_of(inputs.device), case.num_tokens, case.head_dim, case.dtype)


def workspace_of(case: AttentionCase, pictures: int) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Room for dS of so many pictures at a time. Raises AbsentError where the workspace that there is has no more."""
    from fused_beit.kernels.rel_pos_attention import launch

    shape = (case.num_heads, case.num_tokens, case.dtype)
    default = launch.num_pictures_a_pass(case.batch, *shape)
    if pictures >= default:
        raise AbsentError(f"triton takes {default} pictures a pass in this case")

    @contextlib.contextmanager
    def hold() -> Iterator[None]:
        before, launch.WORKSPACE_BYTES = launch.WORKSPACE_BYTES, pictures * launch.bytes_a_picture(*shape)
        try:
            yield
        finally:
            launch.WORKSPACE_BYTES = before

    return hold


def batch_loop(inputs: AttentionInputs, fused: bool = False) -> Work:
    """Our kernels, but the gradient of the bias by a kernel that loops over the pictures.

    fused: one kernel for the gradients of q, k and v, where there is one; else two, as there are in TriFast
    """
    refuse_the_interpreter(inputs.case, inputs.device)
    what_runs(inputs.case, "triton", inputs.device)
    from .attention_batch_loop import attend, tile_for

    default = default_plan(inputs)
    plan = default if fused else default._replace(backward_fused=None)
    if fused and plan.backward_fused is None:
        raise AbsentError("is what batch-loop does in this case")
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


def forward_by(*tile: int) -> Callable[[AttentionInputs], Work]:
    return partial(ours, change=lambda plan: plan._replace(forward=Tile(*tile)))


CANDIDATES = {
    "triton-forward-64x64": Provider(CANDIDATE, "forward tiles 64x64, 4 warps", forward_by(64, 64, 4, 2)),
    "triton-forward-128x64": Provider(CANDIDATE, "forward tiles 128x64, 8 warps", forward_by(128, 64, 8, 2)),
    "triton-two-kernels": Provider(
        CANDIDATE,
        "backward by a kernel for q and one for k, v and the bias",
        partial(ours, change=lambda plan: plan._replace(backward_fused=None)),
    ),
} | {
    # With 12 or 16 heads they are whole rounds of the 132 multiprocessors of an H100 or H200.
    f"triton-passes-{pictures}": Provider(
        CANDIDATE, f"dS of {pictures} pictures a pass", partial(ours, pictures=pictures)
    )
    for pictures in (33, 66)
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
    # Not peers: their forward is ours, and so are two of their three backward kernels.
    "batch-loop": Provider(CANDIDATE, "TriFast's scheme: a third kernel that sums dS over the pictures", batch_loop),
    "batch-loop-fused": Provider(
        CANDIDATE, "the same, the gradients of q, k and v by our fused kernel", partial(batch_loop, fused=True)
    ),
    "xformers": Provider(PEER, "its CUTLASS kernel, on qkv", partial(packed, "xformers")),
    "reference": Provider(PEER, "eager torch", partial(packed, "reference")),
    "compiled": Provider(PEER, "eager torch by torch.compile", partial(packed, "reference", compiled=True)),
    "flex-dense": Provider(PEER, "FlexAttention, dense bias", partial(packed, "flex", deterministic=False)),
    "flex-table": Provider(PEER, "FlexAttention, bias from the table", flex_table),
}

OPERATOR = Operator("rel_pos_attention", PROVIDERS, ON_GPU, ON_CPU, SMOKE, REHEARSAL, written_out="sdpa-apart")
OPERATORS = (OPERATOR,)
