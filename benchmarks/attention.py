"""What attention with the shared bias is timed on: shapes with their bytes and FLOPs, inputs, and the exact results.

B pictures, H heads, N tokens, D channels of a head, R rows of the bias table. The formulas of bytes and FLOPs
are those of kernels/rel_pos_attention/README.md.
"""

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_beit.kernels import expand_table, rel_pos_attention, scatter_table
from fused_beit.kernels.rel_pos_attention.bias import num_relative_positions
from fused_beit.kernels.testing import rel_pos_attention_inputs

from .cases import BACKWARD, BOTH, FORWARD, Case, Function, Work, alike
from .rounds import Outputs, check


@dataclass(frozen=True)
class AttentionCase(Case):
    """Attention over a square window of side² patches and a CLS token, whose bias comes from a table."""

    batch: int
    num_heads: int
    side: int
    head_dim: int = 64

    operator = "rel_pos_attention"
    letters = {"B": "batch", "H": "num_heads", "N": "num_tokens", "D": "head_dim"}  # noqa: RUF012

    @property
    def window(self) -> tuple[int, int]:
        return self.side, self.side

    @property
    def num_tokens(self) -> int:
        return self.side**2 + 1

    def flops(self, direction: str) -> int:
        """Softmax is not counted."""
        products = {FORWARD: 2, BACKWARD: 5, BOTH: 7}[direction]
        return 2 * products * self.batch * self.num_heads * self.num_tokens**2 * self.head_dim

    def bytes(self, direction: str) -> int:
        rows, squares = {FORWARD: (4, 1), BACKWARD: (8, 2), BOTH: (12, 3)}[direction]
        of_rows = self.batch * self.num_tokens * self.num_heads * self.head_dim
        return (rows * of_rows + squares * self.num_heads * self.num_tokens**2) * self.dtype.itemsize

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        made = AttentionInputs(self, device)
        return {"qkv": made.qkv, "bias": made.bias}

    def call(self, impl: str) -> Function:
        return partial(rel_pos_attention, impl=impl)

    def inputs(self, device: torch.device) -> Any:
        return AttentionInputs(self, device)

    def plain(self, inputs: Any) -> Work:
        leaves = {"qkv": inputs.qkv, "bias": inputs.bias}
        output = partial(rel_pos_attention, inputs.qkv, inputs.bias, impl="reference")
        return Work(self, output, self.outputs, leaves, lambda number, output: inputs.grad_out)

    def references(self, inputs: Any) -> Any:
        return AttentionReferences(inputs)


# In the order of their importance: a run that is short of time does the first ones.
ON_GPU = (
    AttentionCase("base", 128, 12, 14),
    AttentionCase("n577", 32, 16, 24),
    AttentionCase("n1025", 16, 16, 32),
    AttentionCase("large", 128, 16, 14),
    AttentionCase("base-64", 64, 12, 14),
    AttentionCase("base-256", 256, 12, 14),
)
# In fp32, for many processors have no products of bf16. With few heads, as of a tiny model, more tokens and
# more pictures, to see how the cost grows.
ON_CPU = (
    AttentionCase("cpu", 2, 12, 14, dtype=torch.float32),
    *(
        AttentionCase(f"cpu-{name}", batch, 3, side, dtype=torch.float32)
        for name, batch, side in (("1", 1, 14), ("n577", 1, 24), ("n1025", 1, 32), ("4", 4, 14), ("8", 8, 14))
    ),
)
SMOKE = (AttentionCase("tiny", 2, 2, 4, 16), AttentionCase("tiny-fp32", 4, 4, 7, 32, dtype=torch.float32))
REHEARSAL = tuple(
    replace(case, batch=2, num_heads=1, side=4 + extra, head_dim=16, dtype=torch.float16, rehearsal=True)
    for extra, case in enumerate(ON_GPU[:2])
)
NO_BIAS = "no bias"


class AttentionInputs:
    """Tensors of a case, made once for all providers; those that get a gradient are leaves."""

    def __init__(self, case: AttentionCase, device: torch.device, batch: int | None = None) -> None:
        self.case, self.device = case, device
        self.batch = batch or case.batch
        shape = (self.batch, case.num_tokens, case.num_heads, case.head_dim)
        qkv = rel_pos_attention_inputs(*shape, bias=False, dtype=case.dtype, device=device)["qkv"]
        assert qkv is not None
        self.qkv = qkv.requires_grad_()
        """[B, N, 3, H, D]"""
        generator = torch.Generator().manual_seed(1)
        table = torch.randn(num_relative_positions(case.window), case.num_heads, generator=generator)
        self.table = table.to(device, case.dtype).requires_grad_()
        """[R, H]"""
        self.bias = expand_table(self.table.detach(), case.window, impl="reference").requires_grad_()
        """[H, N, N], with the aligned rows that RelativePositionBias gives it."""
        grad_out = torch.randn(self.batch, case.num_tokens, case.num_heads * case.head_dim, generator=generator)
        self.grad_out = grad_out.to(device, case.dtype)
        """[B, N, H*D]"""

    @cached_property
    def unaligned_bias(self) -> Tensor:
        """The same numbers without room between the rows."""
        return self.bias.detach().clone(memory_format=torch.contiguous_format).requires_grad_()

    @cached_property
    def apart(self) -> tuple[Tensor, ...]:
        """q, k, v [B, H, N, D], each contiguous."""
        parts = self.qkv.detach().permute(2, 0, 3, 1, 4).unbind(0)
        return tuple(part.contiguous().requires_grad_() for part in parts)


class Results(NamedTuple):
    """Outputs and gradients of eager torch in the dtype of the inputs, and of the reference in float64."""

    eager: Outputs
    exact: Outputs


class AttentionReferences:
    """What providers are held to. Where eager torch does not fit into memory, on fewer pictures than the case has."""

    CHUNK = 2**25
    """Scores of which the float64 reference holds a few at a time."""

    def __init__(self, inputs: AttentionInputs) -> None:
        self.inputs = inputs
        self.found: dict[bool, Results] = {}
        while True:
            try:
                self.found[True] = self.compute(with_bias=True)
                return
            except torch.OutOfMemoryError:
                if self.inputs.batch == 1:
                    raise
            torch.cuda.empty_cache()
            self.inputs = AttentionInputs(inputs.case, inputs.device, batch=-(-self.inputs.batch // 4))

    def compute(self, with_bias: bool) -> Results:
        inputs = self.inputs
        bias = inputs.bias if with_bias else None
        eager = results_of(inputs.qkv, bias, inputs.grad_out)
        size = max(1, self.CHUNK // (inputs.case.num_heads * inputs.case.num_tokens**2))
        pairs = zip(inputs.qkv.split(size), inputs.grad_out.split(size), strict=True)
        double = None if bias is None else leaf(bias.double())
        chunks = [results_of(leaf(qkv.double()), double, grad_out.double()) for qkv, grad_out in pairs]
        exact = {key: torch.cat([chunk[key] for chunk in chunks]) for key in ("output", "grad qkv")}
        if with_bias:
            exact["grad bias"] = sum((chunk["grad bias"] for chunk in chunks[1:]), chunks[0]["grad bias"])
            for results in (eager, exact):
                grad = results["grad bias"]
                dtype = torch.promote_types(grad.dtype, torch.float32)
                results["grad table"] = scatter_table(grad, inputs.case.window, dtype=dtype, impl="reference")
        return Results(eager, exact)

    @property
    def pictures(self) -> int:
        """How many the results are checked on."""
        return self.inputs.batch

    def check(self, name: str, found: Outputs, variant: str) -> dict[str, float]:
        """The relative errors of what a provider found. Raises AssertionError where one breaks the house's rule."""
        with_bias = variant != NO_BIAS
        if with_bias not in self.found:
            self.found[with_bias] = self.compute(with_bias)
        eager, exact = self.found[with_bias]
        # The table's gradient comes from the bias's or instead of it.
        missing = exact.keys() - found.keys() - {"grad bias", "grad table"}
        assert not missing, f"{name} does not give {', '.join(missing)}"
        return check(name, found, alike(eager, found), {key: exact[key] for key in found}, self.inputs.case.dtype)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def results_of(qkv: Tensor, bias: Tensor | None, grad_out: Tensor) -> dict[str, Tensor]:
    """Output and gradients of the reference."""
    leaves = {"grad qkv": qkv} | ({} if bias is None else {"grad bias": bias})
    output = rel_pos_attention(qkv, bias, impl="reference")
    grads = torch.autograd.grad(output, list(leaves.values()), grad_out)
    return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}


def heads_apart(tensor: Tensor, num_heads: int) -> Tensor:
    """[B, N, H*D] -> [B, H, N, D]"""
    return tensor.unflatten(2, (num_heads, -1)).transpose(1, 2)
