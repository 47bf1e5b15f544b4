"""The search for the best code, to be timed. R rows, K codes, D channels; see kernels/nearest_code/README.md."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_beit.kernels import nearest_code
from fused_beit.kernels.testing import nearest_code_inputs

from .cases import FORWARD, Case, Function, Inputs, Work, work_by
from .providers import BOUND, COMPILED, OURS_FIRST, PEER, REFERENCE, Operator, Provider, written
from .rounds import AbsentError, Outputs


@dataclass(frozen=True)
class CodeCase(Case):
    """argmax_k x c_k + b_k for every row, with its value."""

    num_rows: int
    width: int
    num_codes: int

    operator = "nearest_code"
    outputs = ("index", "score")
    directions = (FORWARD,)
    letters = {"R": "num_rows", "D": "width", "K": "num_codes"}  # noqa: RUF012

    def flops(self, direction: str) -> int:
        """The product; comparisons are not counted."""
        return 2 * self.num_rows * self.width * self.num_codes

    def bytes(self, direction: str) -> int:
        """Rows and codes in, an int64 and an fp32 a row out; no scores."""
        return (self.num_rows + self.num_codes) * self.width * self.dtype.itemsize + 12 * self.num_rows

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        made = nearest_code_inputs(self.num_rows, self.width, self.num_codes, dtype=self.dtype, device=device)
        return {name: tensor for name, tensor in made.items() if tensor is not None}

    def call(self, impl: str) -> Function:
        return partial(nearest_code, impl=impl)

    def arranged(self, found: Outputs, inputs: Inputs) -> Outputs:
        """In place of the index, its score in float64: codes that are as good as the best one are as good."""
        x, codes, bias = (inputs.tensors[name] for name in ("x", "codes", "bias"))
        index = found["index"]
        parts = [
            (rows.double() * codes[chosen].double()).sum(dim=-1) + bias[chosen].double()
            for rows, chosen in zip(x.split(4096), index.split(4096), strict=True)
        ]
        score = found["score"]
        return {"score": score, "score of the index": torch.cat(parts).to(score.dtype)}


def product_then_max(x: Tensor, codes: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The whole product in fp32, then the maximum of each row."""
    score, index = F.linear(x.float(), codes.float(), bias.float()).max(dim=-1)
    return index, score


def rounded_product_then_max(inputs: Inputs) -> Work:
    """The same with the product in the dtype of x, rounded before it is compared."""
    if inputs.case.dtype == torch.float32:
        raise AbsentError("is matmul-max in this case")

    def search(x: Tensor, codes: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        score, index = F.linear(x, codes, bias).max(dim=-1)
        return index, score

    return work_by(inputs, search)


PROVIDERS = {
    **OURS_FIRST,
    "matmul-max": Provider(PEER, "the whole product in fp32, then max", written(product_then_max)),
    "matmul-max-rounded": Provider(BOUND, "scores rounded to the dtype of x before max", rounded_product_then_max),
    **REFERENCE,
    **COMPILED,
}
ON_GPU = (CodeCase("dvae", 25088, 2048, 8192), CodeCase("vqkd", 25088, 32, 8192))
ON_CPU = (
    CodeCase("cpu-dvae", 196, 2048, 8192, dtype=torch.float32),
    CodeCase("cpu-vqkd", 784, 32, 8192, dtype=torch.float32),
)
SMOKE = (CodeCase("tiny", 6, 16, 32), CodeCase("tiny-fp32", 98, 64, 1024, dtype=torch.float32))
REHEARSAL = (replace(ON_GPU[0], num_rows=6, width=48, num_codes=40, dtype=torch.float16, rehearsal=True),)

OPERATOR = Operator("nearest_code", PROVIDERS, ON_GPU, ON_CPU, SMOKE, REHEARSAL, written_out="matmul-max")
OPERATORS = (OPERATOR,)
