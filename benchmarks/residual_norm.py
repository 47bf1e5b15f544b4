"""The end of a branch with the next LayerNorm, to be timed. Bytes and formulas: kernels/residual_norm/README.md."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_beit.kernels import residual_norm
from fused_beit.kernels.testing import residual_norm_inputs

from . import liger
from .cases import BACKWARD, BOTH, FORWARD, Case, Function
from .providers import COMPILED, OURS_FIRST, PEER, REFERENCE, Operator, Provider, written

EPS = 1e-6


@dataclass(frozen=True)
class ResidualCase(Case):
    """x + keep gamma y and its LayerNorm; every other picture is dropped."""

    batch: int
    num_tokens: int
    width: int

    operator = "residual_norm"
    outputs = ("x_new", "normed")
    constant = ("keep",)
    letters = {"B": "batch", "N": "num_tokens", "D": "width"}  # noqa: RUF012

    def elements(self) -> int:
        return self.batch * self.num_tokens * self.width

    def flops(self, direction: str) -> int:
        """Additions and multiplications of the formulas, element by element."""
        return {FORWARD: 9, BACKWARD: 17, BOTH: 26}[direction] * self.elements()

    def bytes(self, direction: str) -> int:
        """x and y to x' and normed; gradients of both, x' and y to dx and dy."""
        return {FORWARD: 4, BACKWARD: 6, BOTH: 10}[direction] * self.elements() * self.dtype.itemsize

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        made = residual_norm_inputs(self.batch, self.num_tokens, self.width, dtype=self.dtype, device=device)
        return {name: tensor for name, tensor in made.items() if tensor is not None}

    def call(self, impl: str) -> Function:
        return partial(residual_norm, eps=EPS, impl=impl)


def one_after_another(
    x: Tensor, y: Tensor, gamma: Tensor, keep: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """LayerScale, DropPath, the add and torch's LayerNorm, each by itself, as models are written."""
    x = x + (gamma * y) * keep[:, None, None]
    return x, F.layer_norm(x, (x.shape[-1],), weight, bias, EPS)


ROUNDS_THRICE = "in half precision it rounds three times on the way to x"
PROVIDERS = {
    **OURS_FIRST,
    "one-after-another": Provider(
        PEER,
        "LayerScale, DropPath, add and LayerNorm as models have them",
        written(one_after_another),
        inexact=ROUNDS_THRICE,
    ),
    "liger": Provider(
        PEER,
        "the same with Liger's LayerNorm",
        liger.by(partial(liger.residual_norm, eps=EPS)),
        inexact=ROUNDS_THRICE,
    ),
    **REFERENCE,
    **COMPILED,
}
ON_GPU = (
    ResidualCase("base", 128, 197, 768),
    ResidualCase("large", 128, 197, 1024),
    ResidualCase("base-fp32", 128, 197, 768, dtype=torch.float32),
)
ON_CPU = (ResidualCase("cpu", 8, 197, 768, dtype=torch.float32),)
SMOKE = (ResidualCase("tiny", 2, 5, 16), ResidualCase("tiny-fp32", 8, 50, 192, dtype=torch.float32))
REHEARSAL = (replace(ON_GPU[0], batch=2, num_tokens=5, width=48, dtype=torch.float16, rehearsal=True),)

OPERATOR = Operator("residual_norm", PROVIDERS, ON_GPU, ON_CPU, SMOKE, REHEARSAL, written_out="one-after-another")
OPERATORS = (OPERATOR,)
