"""Attention with a shared additive bias through torch's scaled_dot_product_attention."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._triton import target
from .._triton.descriptors import padded_length


class _FollowedWith(torch.autograd.Function):
    """A tensor, unchanged, that autograd follows where it follows another one; it has no gradient itself."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, other: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def attention_sdpa(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    bias_HNN: Tensor | None,
    mask_WNN: Tensor | None,
    scale: float,
    deterministic: bool,
) -> Tensor:
    """softmax(scale * q k^T + bias + mask) v with bias and mask as `attn_mask`; exact, the bias gradient included.

    The bias is cast to the dtype of q, as torch requires. Torch has a fused kernel with a gradient for `attn_mask`
    only on CUDA (its memory-efficient one): the forward then holds no [B,H,N,N] tensor, but the backward writes the
    gradient of the bias as [B,H,N,N] and sums it over B afterwards. Anywhere else a bias that needs a gradient makes
    torch take its plain path, which holds scores and probabilities as [B,H,N,N] in both directions. With bias and mask
    both, their sum is [B,H,N,N].
    """
    added = dense_bias(bias_HNN, mask_WNN, q_BHND)
    if not q_BHND.numel():  # torch then leaves the bias out of the graph
        return q_BHND + 0 * sum(tensor.sum() for tensor in (k_BHND, v_BHND, added) if tensor is not None)
    if target.pretended:  # torch chooses by the device of the tensors, which is not the one that is counted for
        full = None if added is None else added.expand(q_BHND.shape[0], q_BHND.shape[1], -1, -1)
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(q_BHND, k_BHND, v_BHND, full, True, scale=scale)[0]
    if not q_BHND.is_cuda or added is None:
        return F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, attn_mask=added, scale=scale)
    if lacks_logsumexp(q_BHND, k_BHND, v_BHND, added):
        q_BHND = _FollowedWith.apply(q_BHND, added)
    with without_cudnn() if cudnn_may_give_nan(q_BHND, k_BHND, v_BHND) else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, attn_mask=added, scale=scale)


def lacks_logsumexp(q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, added: Tensor) -> bool:
    """Whether torch's kernel would keep no logsumexp although its backward reads it: an illegal memory access.

    torch asks q, k and v whether they need a gradient, and not attn_mask: pytorch issue 148476, mended in the pull
    request 188302 of June 2026, which torch 2.11 does not have.
    """
    return torch.is_grad_enabled() and added.requires_grad and not _any_needs_grad(q_BHND, k_BHND, v_BHND)


def cudnn_may_give_nan(q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor) -> bool:
    """Whether cuDNN's backward, beside an attn_mask, may give NaN as the gradient of q.

    Its tile of 128 keys takes 64 that are not there for scores of 0, and exp(0 - logsumexp) overflows where a row's
    logsumexp is below -88: pytorch issue 196678, in torch 2.11 to 2.14 with cuDNN to 9.25. torch takes cuDNN only where
    attn_mask needs no gradient, so this is about a frozen bias or a mask alone, as in Swin's windows of 64 tokens.
    """
    return torch.is_grad_enabled() and q_BHND.shape[2] % 128 == 64 and _any_needs_grad(q_BHND, k_BHND, v_BHND)


def _any_needs_grad(*tensors: Tensor) -> bool:
    return any(tensor.requires_grad for tensor in tensors)


_switch = threading.Lock()
_num_without, _was_enabled = 0, True


@contextlib.contextmanager
def without_cudnn() -> Iterator[None]:
    """torch's attention by any of its kernels that are allowed, but not by cuDNN.

    The switch is the process's: of several threads the first turns it off, and the last puts it back.
    """
    global _num_without, _was_enabled
    with _switch:
        if not _num_without:
            _was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
            torch.backends.cuda.enable_cudnn_sdp(False)
        _num_without += 1
    try:
        yield
    finally:
        with _switch:
            _num_without -= 1
            if not _num_without:
                torch.backends.cuda.enable_cudnn_sdp(_was_enabled)


def rounded_in_aligned_rows(bias_HNN: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias in `dtype`, in rows that torch's fused kernel on CUDA takes without a copy of its own."""
    if bias_HNN.dtype == dtype:
        return bias_HNN
    num_tokens = bias_HNN.shape[-1]
    return F.pad(bias_HNN.to(dtype), (0, padded_length(num_tokens) - num_tokens))[..., :num_tokens]


def dense_bias(bias_HNN: Tensor | None, mask_WNN: Tensor | None, q_BHND: Tensor) -> Tensor | None:
    """Bias and mask in one tensor that broadcasts to [B, H, N, N], in the dtype of q; None where there is neither."""
    bias_1HNN = None if bias_HNN is None else rounded_in_aligned_rows(bias_HNN, q_BHND.dtype)[None]
    if mask_WNN is None:
        return bias_1HNN
    batch, _, num_tokens, _ = q_BHND.shape
    mask_B1NN = mask_WNN.expand(-1, num_tokens, -1).repeat(batch // mask_WNN.shape[0], 1, 1)[:, None]
    return mask_B1NN if bias_1HNN is None else bias_1HNN + mask_B1NN
