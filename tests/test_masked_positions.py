"""Positions of masked patches made of the bool masks of other libraries."""

import pytest
import torch
from waiting import no_waiting

from fused_beit.kernels import embed_tokens, keep_visible, masked_positions_from_bool
from fused_beit.kernels.testing import embed_tokens_inputs, keep_visible_inputs

MASK = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()


def test_they_are_in_ascending_order_with_empty_slots_last():
    assert masked_positions_from_bool(MASK).tolist() == [[1, 3], [3, -1], [-1, -1]]
    assert masked_positions_from_bool(MASK).dtype == torch.int64


@pytest.mark.parametrize(("num_slots", "last"), [(2, []), (3, [-1]), (6, [-1] * 4)])
def test_a_fixed_number_of_slots_gives_every_batch_one_shape(num_slots, last):
    found = masked_positions_from_bool(MASK, num_slots)
    assert found.tolist() == [[1, 3, *last], [3, -1, *last], [-1, -1, *last]]
    assert found.is_contiguous()


def test_a_mask_for_all_batches_is_a_mask_of_all_patches():
    everything = torch.ones(2, 5, dtype=torch.bool)
    assert torch.equal(masked_positions_from_bool(everything), torch.arange(5).expand(2, 5))
    assert masked_positions_from_bool(~everything).shape == (2, 0)
    assert masked_positions_from_bool(everything[:0]).shape == (0, 0)


def test_they_mask_what_the_mask_masks():
    inputs = embed_tokens_inputs(3, 4, 8, 2)
    inputs |= {"pos_embed": None, "masked_positions": masked_positions_from_bool(MASK, 3)}
    out = embed_tokens(**inputs)[:, 1:]
    expected = torch.where(MASK[:, :, None], inputs["mask_token"], inputs["patches"])
    assert torch.equal(out, expected)


def test_of_the_inverse_they_keep_what_is_visible():
    inputs = keep_visible_inputs(1, 4, 8, 2)
    inputs |= {"pos_embed": None, "visible_positions": masked_positions_from_bool(~MASK[:1])}
    assert torch.equal(keep_visible(**inputs)[:, 1:], inputs["patches"][:, [0, 2]])


def test_with_a_number_of_slots_nothing_waits_for_the_device_and_nothing_breaks_the_graph():
    torch.compiler.reset()
    compiled = torch.compile(masked_positions_from_bool, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(MASK, 3), masked_positions_from_bool(MASK, 3))
    with no_waiting():
        masked_positions_from_bool(MASK, 3)


@pytest.mark.parametrize(
    ("mask", "num_slots", "error", "message"),
    [
        (MASK, 1, ValueError, "num_slots is 1, but picture 0 has 2 masked patches"),
        (MASK, -1, ValueError, "num_slots must be at least 0, but is -1"),
        (
            MASK.long(),
            None,
            TypeError,
            r"must be torch.bool, .* but is torch.int64; of ones and zeros .bool\(\)",
        ),
        (MASK[0], None, ValueError, r"bool_masked_pos must have shape \[B, P\], but has \[4\]"),
        (MASK.view(3, 2, 2), None, ValueError, r"must have shape \[B, P\], but has \[3, 2, 2\]"),
    ],
)
def test_wrong_arguments_are_refused_with_what_was_expected(mask, num_slots, error, message):
    with pytest.raises(error, match=message):
        masked_positions_from_bool(mask, num_slots)
