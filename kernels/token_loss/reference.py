"""The loss over visual tokens in torch: the specification.

R rows (masked patches), V tokens of the vocabulary, D channels.
"""

from torch import Tensor
from torch.nn import functional as F

from ..precision import accumulate_dtype, compute_dtype, without_autocast


def token_loss_reference(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_R: Tensor,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and accuracy of hidden @ weight^T + bias; the product in the dtype of hidden, the rest in fp32."""
    dtype = compute_dtype(hidden_RD)
    with without_autocast(hidden_RD.device):
        bias_V = None if bias_V is None else bias_V.to(dtype)
        logits_RV = F.linear(hidden_RD.to(dtype), weight_VD.to(dtype), bias_V)
        counted_R = targets_R != ignore_index
        logits_RV = logits_RV.to(accumulate_dtype(dtype))
        # torch.max gives the first of equal maxima, and on a CPU sooner than argmax does; and NaN where there is one.
        best_R = logits_RV.detach().max(dim=-1)
        hits_R = (best_R.indices == targets_R) & counted_R & ~best_R.values.isnan()
        loss = F.cross_entropy(
            logits_RV,
            targets_R,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction="none" if reduction == "none" else "sum",
        )
        if reduction == "none":
            return loss, hits_R.to(loss.dtype)
        # The count stays on the device; at least 1, so that no row at all gives 0 and not 0/0.
        num_counted = counted_R.sum().clamp_min(1)
        return loss / num_counted, hits_R.sum().to(loss.dtype) / num_counted
