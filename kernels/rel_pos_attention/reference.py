"""Attention with a shared additive bias, written out in torch: the specification.

B pictures, H heads, N tokens, D channels of a head; W masks, of which picture b uses number b mod W.
"""

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

    A query to which bias and mask leave no key, -inf for each, gives zeros and has gradients of zero. Scores, bias and
    mask are in the dtype of q; the softmax sums in fp32 and is rounded to that dtype.
    """
    # Scaling q touches N*D numbers where scaling the scores would touch N*N.
    scores_BHNN = (q_BHND * scale) @ k_BHND.transpose(-2, -1)
    if bias_HNN is None and mask_WNN is None:
        return scores_BHNN.softmax(-1) @ v_BHND
    bias_HNN = None if bias_HNN is None else bias_HNN.to(scores_BHNN.dtype)
    if mask_WNN is None:
        assert bias_HNN is not None
        no_key = bias_HNN.isneginf().all(-1, keepdim=True)  # [H,N,1]
        # In place: the product needs no copy of its result for its own gradient.
        scores_BHNN.add_(bias_HNN.masked_fill(no_key, 0))
    else:
        if bias_HNN is not None:
            scores_BHNN.add_(bias_HNN)
        num_masks = mask_WNN.shape[0]
        scores_BHNN = (scores_BHNN.unflatten(0, (-1, num_masks)) + mask_WNN[:, None]).flatten(0, 1)
        no_key = scores_BHNN.isneginf().all(-1, keepdim=True)  # [B,H,N,1]
        scores_BHNN = scores_BHNN.masked_fill(no_key, 0)
    # A product with 0 or 1, which is several times faster than masked_fill on a CPU.
    return (scores_BHNN.softmax(-1) @ v_BHND).mul_((~no_key).to(v_BHND.dtype))
