"""Who computes attention with the shared bias: ours, other tiles of ours, what people would use instead, and bounds.

A bound is faster work that is not the same: attention without the bias, or with one that gets no gradient.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fused_beit.kernels import SharedBias, attention_plan, rel_pos_attention, relative_position_index, resolve
from fused_beit.kernels._triton.target import arch_of
from fused_beit.kernels.rel_pos_attention.plan import Plan, Tile, pinned

from .attention import BACKWARD, BOTH, FORWARD, Inputs, heads_apart, leaf
from .rounds import AbsentError, Outputs
from .timers import Run, Staged

OURS, CANDIDATE, PEER, BOUND = "ours", "candidate", "peer", "bound"


@dataclass(frozen=True)
class Work:
    """One provider's attention on the inputs of a case."""

    call: Callable[[], Tensor]
    leaves: dict[str, Tensor]
    """What gets a gradient, by name: qkv or q, k, v; bias or table."""
    grad_out: Tensor
    buffer: Tensor | None = None
    """Where the gradient of the bias is added instead."""
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    """Holds while it runs, forward and backward."""
    plan: str = ""
    """Kernels and tiles, where they are ours."""

    def forward(self) -> Tensor:
        with self.around():
            return self.call()

    def backward(self, output: Tensor) -> tuple[Tensor | None, ...]:
        unused = self.buffer is not None
        with self.around():
            return torch.autograd.grad(output, tuple(self.leaves.values()), self.grad_out, allow_unused=unused)

    def both(self) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        output = self.forward()
        return output, self.backward(output)

    def run(self, direction: str) -> Run:
        """A new run, to be timed."""
        runs = {FORWARD: lambda: self.forward(), BOTH: lambda: self.both()}
        return Staged(self.forward, self.backward) if direction == BACKWARD else runs[direction]

    def results(self) -> Outputs:
        """All that is checked, in the shapes of the reference."""
        if self.buffer is not None:
            self.buffer.zero_()
        output, grads = self.both()
        found = {f"grad {name}": grad for name, grad in zip(self.leaves, grads, strict=True)}
        if self.buffer is not None:
            assert found["grad bias"] is None, "the gradient of the bias went to autograd and not only into the buffer"
            found["grad bias"] = self.buffer.clone()
        if "q" in self.leaves:
            parts = [found.pop(f"grad {name}") for name in "qkv"]
            found["grad qkv"] = torch.stack(parts).permute(1, 3, 0, 2, 4)
            output = output.transpose(1, 2).flatten(2)
        return {"output": output.detach(), **found}


class Provider(NamedTuple):
    """How it is called in tables, what it is, and how it is made for a case."""

    kind: str
    about: str
    make: Callable[[Inputs], Work]
    """Raises AbsentError or ImplUnavailable where it cannot run."""
    with_bias: bool = True


def packed(
    impl: str,
    inputs: Inputs,
    *,
    bias: Tensor | None = None,
    rounded_bias: Tensor | None = None,
    compiled: bool = False,
    **options: Any,
) -> Work:
    """`rel_pos_attention` by one of its implementations, on qkv as the linear gives it."""
    resolve("rel_pos_attention", impl, inputs.device)
    bias = inputs.bias if bias is None else bias

    def attend(qkv: Tensor, bias: Tensor) -> Tensor:
        shared = bias if rounded_bias is None else SharedBias(bias, rounded_bias)
        return rel_pos_attention(qkv, shared, impl=impl, **options)

    if compiled:
        if inputs.device.type == "cpu":
            raise AbsentError("compiled for GPUs only")
        attend = torch.compile(attend, dynamic=False)
    leaves = {"qkv": inputs.qkv, "bias": bias}
    return Work(lambda: attend(inputs.qkv, bias), leaves, inputs.grad_out, options.get("accumulate_into"))


def apart(inputs: Inputs, bias: Tensor | None, backend: SDPBackend | None = None) -> Work:
    """torch's own attention on q, k, v that are contiguous each, as no model has them but every benchmark does."""
    q, k, v = inputs.apart
    mask = None if bias is None else bias[None]
    leaves = {"q": q, "k": k, "v": v} | ({} if bias is None or not bias.requires_grad else {"bias": bias})

    def call() -> Tensor:
        with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return Work(call, leaves, heads_apart(inputs.grad_out, inputs.case.num_heads))


def flex_table(inputs: Inputs) -> Work:
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

    return Work(call, {"qkv": inputs.qkv, "table": table}, inputs.grad_out)


def ours(
    inputs: Inputs,
    change: Callable[[Plan], Plan] | None = None,
    workspace: int | None = None,
    accumulate: bool = False,
    shared: bool = False,
    deterministic: bool = True,
) -> Work:
    """The Triton kernels, as they are or by another plan, or with a workspace of so many bytes."""
    if inputs.device.type == "cpu" and not inputs.case.rehearsal:
        raise AbsentError("on a CPU Triton runs only in its interpreter, whose times say nothing")
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
    if workspace is not None and workspace == workspace_bytes():
        raise AbsentError("is what triton has")

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if change is not None or inputs.case.rehearsal:
                stack.enter_context(pinned(plan))
            if workspace is not None:
                stack.enter_context(workspace_of(workspace))
            yield

    return replace(work, around=around, plan=str(plan))


def default_plan(inputs: Inputs) -> Plan:
    """What the kernels do by themselves; in a rehearsal, what they would do on an H100 with 197 tokens."""
    case = inputs.case
    if case.rehearsal:
        return attention_plan("sm_90", 197, 64, case.dtype)
    return attention_plan(arch_of(inputs.device), case.num_tokens, case.head_dim, case.dtype)


def workspace_bytes() -> int:
    from fused_beit.kernels.rel_pos_attention import launch

    return launch.WORKSPACE_BYTES


@contextlib.contextmanager
def workspace_of(size: int) -> Iterator[None]:
    from fused_beit.kernels.rel_pos_attention import launch

    before, launch.WORKSPACE_BYTES = launch.WORKSPACE_BYTES, size
    try:
        yield
    finally:
        launch.WORKSPACE_BYTES = before


def forward_by(*tile: int) -> Callable[[Inputs], Work]:
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
    f"triton-workspace-{mib}": Provider(CANDIDATE, f"workspace of {mib} MiB", partial(ours, workspace=mib * 2**20))
    for mib in (16, 64, 128)
}

# The first is what all others are compared with; what compiles for long comes last.
PROVIDERS = {
    "triton": Provider(OURS, "the default: gradient of the bias in a fixed order", ours),
    "triton-any-order": Provider(OURS, "deterministic=False", partial(ours, deterministic=False)),
    "triton-shared": Provider(OURS, "an fp32 bias, rounded before: as layers share it", partial(ours, shared=True)),
    "triton-accumulate": Provider(OURS, "accumulate_into", partial(ours, accumulate=True)),
    **CANDIDATES,
    "sdpa": Provider(PEER, "torch's, on qkv, rows of the bias aligned", partial(packed, "sdpa")),
    "sdpa-unaligned": Provider(
        PEER, "the same, rows not aligned", lambda inputs: packed("sdpa", inputs, bias=inputs.unaligned_bias)
    ),
    "sdpa-apart": Provider(PEER, "torch's, on contiguous q, k, v", lambda inputs: apart(inputs, inputs.bias)),
    "flash-no-bias": Provider(
        BOUND,
        "torch's flash kernel, on contiguous q, k, v, without a bias",
        lambda inputs: apart(inputs, None, SDPBackend.FLASH_ATTENTION),
        with_bias=False,
    ),
    "cudnn-frozen-bias": Provider(
        BOUND,
        "cuDNN, on contiguous q, k, v, the bias without a gradient",
        lambda inputs: apart(inputs, inputs.bias.detach(), SDPBackend.CUDNN_ATTENTION),
    ),
    "xformers": Provider(PEER, "its CUTLASS kernel, on qkv", partial(packed, "xformers")),
    "reference": Provider(PEER, "eager torch", partial(packed, "reference")),
    "compiled": Provider(PEER, "eager torch by torch.compile", partial(packed, "reference", compiled=True)),
    "flex-dense": Provider(PEER, "FlexAttention, dense bias", partial(packed, "flex", deterministic=False)),
    "flex-table": Provider(PEER, "FlexAttention, bias from the table", flex_table),
}


def planted_wrong(inputs: Inputs) -> Work:
    return packed("reference", inputs, bias=(inputs.bias.detach() * 0.9).requires_grad_())


def planted_out_of_memory(inputs: Inputs) -> Work:
    raise torch.OutOfMemoryError("planted: tried to allocate what there is not")


def planted_crash(inputs: Inputs) -> Work:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


PLANTED = {
    "planted-wrong": Provider(OURS, "a wrong result, which must be noticed", planted_wrong),
    "planted-out-of-memory": Provider(PEER, "no memory, which must be recorded", planted_out_of_memory),
    "planted-crash": Provider(PEER, "the end of its process, which others must survive", planted_crash),
}
"""For rehearsals, which show with them that failures are found and survived."""
