"""The loss over visual tokens, to be timed. R rows, D channels, V tokens; see kernels/token_loss/README.md."""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_beit.kernels import token_loss
from fused_beit.kernels.testing import token_loss_inputs

from . import liger
from .cases import BACKWARD, BOTH, FORWARD, Case, Function, Inputs, References, Work, work_by
from .providers import BOUND, COMPILED, OURS_FIRST, PEER, REFERENCE, Operator, Provider, written
from .rounds import Outputs

PRODUCTS = "products"


@dataclass(frozen=True)
class LossCase(Case):
    """Linear to the vocabulary, cross-entropy and accuracy over all rows."""

    num_rows: int
    width: int
    vocab_size: int

    operator = "token_loss"
    outputs = ("loss", "accuracy")
    # Ours makes its gradients in the forward, so a backward by itself would say nothing; the forward is evaluation's.
    directions = (FORWARD, BOTH)
    variants: ClassVar = {PRODUCTS: {"outputs": ("logits",), "leaves": ("hidden", "weight")}}
    letters = {"R": "num_rows", "D": "width", "V": "vocab_size"}  # noqa: RUF012

    def flops(self, direction: str) -> int:
        """One product forward and two backward; the softmax is not counted."""
        products = {FORWARD: 1, BACKWARD: 2, BOTH: 3}[direction]
        return 2 * products * self.num_rows * self.width * self.vocab_size

    def bytes(self, direction: str) -> int:
        """hidden and weight, and in the backward their gradients; no logits."""
        passes = {FORWARD: 1, BACKWARD: 2, BOTH: 3}[direction]
        return passes * (self.num_rows + self.vocab_size) * self.width * self.dtype.itemsize

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """Targets are the likeliest token where it leads clearly, else the least likely: accuracy can be but one."""
        made = token_loss_inputs(self.num_rows, self.width, self.vocab_size, dtype=self.dtype, device=device)
        tensors = {name: tensor for name, tensor in made.items() if tensor is not None}
        logits_RV = F.linear(*(tensors[name].float() for name in ("hidden", "weight", "bias")))
        (first, second), index = (part.unbind(-1) for part in logits_RV.topk(2, dim=-1))
        tensors["targets"] = torch.where(first - second > 0.2, index[0], logits_RV.argmin(dim=-1))
        return tensors

    def call(self, impl: str) -> Function:
        return partial(token_loss, impl=impl)

    def references(self, inputs: Inputs) -> References:
        return LossReferences(inputs)

    def specification(self, variant: str) -> Function:
        return products if variant == PRODUCTS else super().specification(variant)


class LossReferences(References):
    """The loss is a mean. Eager torch's roundings may cancel in it, and nothing would be no worse than eager torch."""

    def compare(self, name: str, found: Outputs, eager: Outputs, exact: Outputs) -> dict[str, float]:
        if "loss" not in exact:
            return super().compare(name, found, eager, exact)
        others = [{key: value for key, value in some.items() if key != "loss"} for some in (found, eager, exact)]
        return self.compare_mean(name, found["loss"], exact["loss"]) | super().compare(name, *others)

    def compare_mean(self, name: str, found: Tensor, exact: Tensor) -> dict[str, float]:
        """Six standard deviations of a mean over the rows, of two roundings each of logits as large as the largest."""
        case, tensors = self.inputs.case, self.inputs.tensors
        hidden, weight, bias = (tensors[part].detach().double() for part in ("hidden", "weight", "bias"))
        largest = float(F.linear(hidden, weight, bias).abs().max())
        deviation = torch.finfo(case.dtype).eps * largest / 12**0.5
        of_rows = 6 * 2**0.5 * deviation / len(hidden) ** 0.5
        allowed = of_rows + torch.finfo(found.dtype).eps * float(exact)
        off = float((found.double() - exact).abs())
        assert off <= allowed, f"{name}: the loss is off by {off:.2e}, more than the {allowed:.2e} of roundings"
        return {"loss": off / float(exact)}


def products(hidden: Tensor, weight: Tensor, **others: Tensor) -> Tensor:
    """The linear alone: with its gradients, the three products that nobody can do without."""
    return F.linear(hidden, weight)


def the_products(inputs: Inputs) -> Work:
    return work_by(inputs, products, **inputs.case.variants[PRODUCTS])


def in_its_own_dtype(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """torch's cross-entropy of the logits as they come, without a copy of them in fp32."""
    logits = F.linear(hidden, weight, bias)
    accuracy = (logits.detach().argmax(dim=-1) == targets).float().mean()
    return F.cross_entropy(logits, targets), accuracy


def in_fp32(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """torch's cross-entropy of the logits in fp32, as autocast does it, and a second pass for the accuracy."""
    logits = F.linear(hidden, weight, bias)
    accuracy = (logits.detach().max(dim=-1)[1] == targets).float().mean()
    return F.cross_entropy(logits.float(), targets), accuracy


ROUNDED_LOGITS = "the loss and log-probabilities are rounded to the dtype of the logits"
PROVIDERS = {
    **OURS_FIRST,
    "cross-entropy-fp32": Provider(PEER, "linear, F.cross_entropy in fp32, accuracy", written(in_fp32)),
    "cross-entropy": Provider(
        PEER,
        "the same in the dtype of the logits",
        written(in_its_own_dtype),
        inexact=ROUNDED_LOGITS,
    ),
    "liger": Provider(
        PEER, "Liger's linear with cross-entropy and accuracy", liger.by(liger.token_loss), inexact=ROUNDED_LOGITS
    ),
    "products": Provider(BOUND, "the linear's products alone", the_products, variant=PRODUCTS),
    **REFERENCE,
    **COMPILED,
}
ON_GPU = (
    LossCase("base", 9600, 768, 8192),
    LossCase("large", 9600, 1024, 8192),
    LossCase("base-2400", 2400, 768, 8192),
)
ON_CPU = (LossCase("cpu", 150, 768, 8192, dtype=torch.float32),)
SMOKE = (LossCase("tiny", 6, 16, 32), LossCase("tiny-fp32", 48, 192, 1024, dtype=torch.float32))
REHEARSAL = (replace(ON_GPU[0], num_rows=6, width=48, vocab_size=64, dtype=torch.float16, rehearsal=True),)

OPERATOR = Operator("token_loss", PROVIDERS, ON_GPU, ON_CPU, SMOKE, REHEARSAL, written_out="cross-entropy-fp32")
OPERATORS = (OPERATOR,)
