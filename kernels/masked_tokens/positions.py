"""Positions of masked patches, as the operators take them, from the bool masks that other libraries hand out."""

import torch
from torch import Tensor

from ..tracing import fx_leaf
from ..validation import check_num_masked, check_number, check_shape


@fx_leaf
def masked_positions_from_bool(bool_masked_pos: Tensor, num_slots: int | None = None) -> Tensor:
    """The places where a mask is True, in ascending order, -1 in the slots that are left: bool [B, P] -> int64 [B, M].

    bool_masked_pos: bool [B, P]   True for a masked patch, as of unilm and transformers; [B, Wh, Ww] is .flatten(1).
                                   For `keep_visible` and `restore_tokens` it is ~bool_masked_pos.
    num_slots:                     M, fixed for all batches. None takes the most that a picture of this batch has, which
                                   waits for the device and gives another shape to every batch.
    ->               int64 [B, M]  on the device of the mask

    A picture with more than num_slots is refused on a CPU outside of torch.compile; elsewhere nobody looks, since that
    would wait for the device, and its last ones are left out.
    Raises ValueError or TypeError for wrong arguments.
    """
    name = "masked_positions_from_bool"
    check_shape(name, "bool_masked_pos", bool_masked_pos, "B", "P")
    if bool_masked_pos.dtype != torch.bool:
        raise TypeError(
            f"{name}: bool_masked_pos must be torch.bool, True for a masked patch, but is {bool_masked_pos.dtype}; "
            f"of ones and zeros .bool() makes it"
        )
    check_number(name, num_slots=num_slots)
    if isinstance(num_slots, float):
        raise TypeError(f"{name}: num_slots must be a whole number, but is {num_slots}")
    num_pictures, num_patches = bool_masked_pos.shape
    # Which slot a masked patch takes: the number of masked ones before it.
    slots_BP = bool_masked_pos.cumsum(1) - 1
    if num_slots is None:
        num_slots = int(slots_BP.max()) + 1 if slots_BP.numel() else 0
    elif num_slots < 0:
        raise ValueError(f"{name}: num_slots must be at least 0, but is {num_slots}")
    else:
        check_num_masked(name, bool_masked_pos, num_slots)
    # Visible patches, and those beyond the last slot, go to a slot that is then cut off.
    slots_BP = torch.where(bool_masked_pos & (slots_BP < num_slots), slots_BP, num_slots)
    patches_BP = torch.arange(num_patches, device=slots_BP.device).expand(num_pictures, num_patches)
    positions_BM = slots_BP.new_full((num_pictures, num_slots + 1), -1)
    return positions_BM.scatter(1, slots_BP, patches_BP)[:, :num_slots].contiguous()
