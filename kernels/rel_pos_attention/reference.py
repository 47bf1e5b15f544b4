"""Attention with a shared additive bias, written out in torch: the specification.

B pictures, H heads, N tokens, D channels of a head; W masks, of which picture b uses number b mod W.
"""

import torch
from torch import Tensor


def attention_reference(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    bias_HNN: Tensor | None,
    mask_WNN: Tensor | None,
    scale: float,
    deterministic: bool,
) -> Tensor:
    """softmax(scale * q k^T + bias + mask) v: [B,H,N,D] -> [B,H,N,D].

    A query to which bias and mask leave no key, -inf for each, gives zeros and has gradients of zero. Without a mask, a
    bias whose gradient is to be made is taken to be finite: to look for such rows in every layer of a training costs up
    to a tenth of its attention. Scores, bias and mask are in the dtype of q; the softmax sums in fp32 and is rounded to
    that dtype.
    """
    # Scaling q touches N*D numbers where scaling the scores would touch N*N.
    scores_BHNN = (q_BHND * scale) @ k_BHND.transpose(-2, -1)
    if bias_HNN is not None:
        # In place: the product needs no copy of its result for its own gradient.
        scores_BHNN.add_(bias_HNN.to(scores_BHNN.dtype))
    if mask_WNN is not None:
        num_masks = mask_WNN.shape[0]
        scores_BHNN = (scores_BHNN.unflatten(0, (-1, num_masks)) + mask_WNN[:, None]).flatten(0, 1)
    elif bias_HNN is None or (bias_HNN.requires_grad and torch.is_grad_enabled()):
        return scores_BHNN.softmax(-1) @ v_BHND
    no_key_BHN1 = scores_BHNN.isneginf().all(-1, keepdim=True)
    return scores_BHNN.masked_fill(no_key_BHN1, 0).softmax(-1).masked_fill(no_key_BHN1, 0) @ v_BHND
