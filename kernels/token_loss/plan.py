"""How many rows of logits are held at a time, and what a call takes of memory beside its inputs."""

from typing import NamedTuple

import torch

from .._triton.descriptors import padded_length
from ..precision import accumulate_dtype

LOGITS_BYTES = 64 * 2**20
"""Most that the logits, which their gradient overwrites, take at a time; a single row may take more.

64 MiB hold 4,096 rows of 8,192 tokens in half precision: enough for a matrix product to fill a large GPU.
"""

ROW_STEP = 128
"""Rows of a chunk, and so of a matrix product, are a multiple of it where there are so many."""


class TokenLossPlan(NamedTuple):
    """How `impl="triton"` runs for one shape; `bytes` are of the largest tensors that it allocates."""

    num_rows: int
    vocab_size: int
    rows_a_chunk: int
    logits_bytes: int
    grad_hidden_bytes: int
    grad_weight_bytes: int
    """The gradients kept from the forward to the backward, summed in fp32, of the weight with those of the bias."""
    cast_weight_bytes: int
    """Of a copy of the weight in the dtype of the product, where it has another one."""

    @property
    def num_chunks(self) -> int:
        return -(-self.num_rows // self.rows_a_chunk)

    @property
    def extra_bytes(self) -> int:
        """All of them, and two numbers for each row."""
        rows = 8 * self.num_rows
        return self.logits_bytes + self.grad_hidden_bytes + self.grad_weight_bytes + self.cast_weight_bytes + rows

    def __str__(self) -> str:
        parts = {
            "logits": self.logits_bytes,
            "gradient of hidden": self.grad_hidden_bytes,
            "of weight and bias": self.grad_weight_bytes,
            "weight cast": self.cast_weight_bytes,
        }
        words = ", ".join(f"{name} {count / 1e6:.1f} MB" for name, count in parts.items() if count)
        return (
            f"{self.num_chunks} chunks of {self.rows_a_chunk} rows, {self.extra_bytes / 1e6:.1f} MB beside the inputs: "
            f"{words}"
        )


def token_loss_plan(
    num_rows: int,
    width: int,
    vocab_size: int,
    dtype: torch.dtype,
    *,
    weight_dtype: torch.dtype | None = None,
    has_gradients: bool = True,
) -> TokenLossPlan:
    """Chunks and bytes of token_loss(impl="triton", reduction="mean") for hidden [R, D] and weight [V, D].

    dtype: of the product, which is that of hidden, or autocast's
    weight_dtype: of the weight, where it differs
    has_gradients: of hidden, weight and bias; without them only the logits are held
    """
    rows = rows_a_chunk(num_rows, vocab_size, dtype)
    wide = accumulate_dtype(dtype).itemsize
    return TokenLossPlan(
        num_rows,
        vocab_size,
        rows,
        min(rows, num_rows) * padded_length(vocab_size) * dtype.itemsize,
        num_rows * width * dtype.itemsize if has_gradients else 0,
        vocab_size * (width + 1) * wide if has_gradients else 0,
        0 if weight_dtype in (None, dtype) else vocab_size * width * dtype.itemsize,
    )


def rows_a_chunk(num_rows: int, vocab_size: int, dtype: torch.dtype) -> int:
    """Rows of all chunks but the last, which may have fewer: as equal as ROW_STEP lets them be."""
    most = max(1, LOGITS_BYTES // (padded_length(vocab_size) * dtype.itemsize))
    if num_rows <= most:
        return max(1, num_rows)
    num_chunks = -(-num_rows // most)
    rows = -(-num_rows // num_chunks)
    return min(most, -(-rows // ROW_STEP) * ROW_STEP)
