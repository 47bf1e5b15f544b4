"""MAE's tokens: the masked patches left out before the encoder, and put back as mask tokens before the decoder."""

import pytest
import torch

from fused_beit.kernels import embed_tokens, keep_visible, restore_tokens
from fused_beit.kernels.testing import assert_parity, keep_visible_inputs, restore_tokens_inputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WITHOUT = [(), ("pos_embed",)]


def keep_by_loops(patches, cls_token, pos_embed, visible_positions):
    """Slot by slot, from the definition."""
    if pos_embed is None:
        pos_embed = patches.new_zeros(patches.shape[1] + 1, patches.shape[2])
    pictures = []
    for b, positions in enumerate(visible_positions.tolist()):
        kept = [patches[b, p] + pos_embed[1 + p] if p >= 0 else torch.zeros_like(cls_token) for p in positions]
        pictures.append(torch.stack([cls_token + pos_embed[0], *kept]))
    return torch.stack(pictures)


def restore_by_loops(x, mask_token, pos_embed, visible_positions, num_patches):
    """Patch by patch, from the definition."""
    pictures = []
    for b, positions in enumerate(visible_positions.tolist()):
        patches = [x[b, 1 + positions.index(p)] if p in positions else mask_token for p in range(num_patches)]
        pictures.append(torch.stack([x[b, 0], *patches]))
    tokens = torch.stack(pictures)
    return tokens if pos_embed is None else tokens + pos_embed


def restore_nine(**inputs):
    return restore_tokens(**inputs, num_patches=9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("without", WITHOUT, ids=str)
@pytest.mark.parametrize(("num_visible", "num_padding"), [(1, 0), (3, 2), (8, 0)])
def test_both_equal_the_definition_written_as_loops(dtype, without, num_visible, num_padding):
    options = {"num_padding": num_padding, "dtype": dtype}
    inputs = keep_visible_inputs(2, 9, 8, num_visible, **options) | dict.fromkeys(without)
    assert_parity(keep_visible, keep_by_loops, inputs)
    inputs = restore_tokens_inputs(2, 9, 8, num_visible, **options) | dict.fromkeys(without)
    assert_parity(restore_nine, lambda **given: restore_by_loops(**given, num_patches=9), inputs)


def test_restoring_what_was_kept_gives_the_picture_with_mask_tokens():
    inputs = keep_visible_inputs(2, 9, 8, 4)
    visible = inputs["visible_positions"]
    masked = torch.tensor([[p for p in range(9) if p not in row] for row in visible.tolist()])
    mask_token, decoder_positions = torch.randn(8), torch.randn(10, 8)
    kept = keep_visible(inputs["patches"], inputs["cls_token"], None, visible)
    restored = restore_tokens(kept, mask_token, decoder_positions, visible, 9)
    expected = embed_tokens(inputs["patches"], mask_token, inputs["cls_token"], decoder_positions, masked)
    assert torch.equal(restored, expected)


def test_fp32_parameters_keep_the_tokens_in_fp32_when_autocast_made_them_bf16():
    kept, restored = keep_visible_inputs(2, 9, 8, 4), restore_tokens_inputs(2, 9, 8, 4)
    kept["patches"], restored["x"] = kept["patches"].bfloat16(), restored["x"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = keep_visible(**kept), restore_nine(**restored)
    assert [out.dtype for out in outputs] == [torch.float32] * 2
    torch.testing.assert_close(outputs, (keep_by_loops(**kept), restore_by_loops(**restored, num_patches=9)))


@pytest.mark.parametrize(
    ("operator", "inputs"),
    [
        (keep_visible, keep_visible_inputs(2, 9, 3, 4, num_padding=1, dtype=torch.float64)),
        (restore_nine, restore_tokens_inputs(2, 9, 3, 4, num_padding=1, dtype=torch.float64)),
    ],
)
def test_gradients_pass_gradcheck(operator, inputs):
    names = [name for name in inputs if inputs[name].is_floating_point()]
    leaves = [inputs[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(
        lambda *given: operator(**inputs | dict(zip(names, given, strict=True))), leaves, fast_mode=True
    )


@pytest.mark.parametrize(
    ("operator", "inputs"),
    [
        (keep_visible, keep_visible_inputs(2, 9, 8, 4, num_padding=1)),
        (restore_nine, restore_tokens_inputs(2, 9, 8, 4, num_padding=1)),
    ],
)
def test_both_compile_without_a_graph_break(operator, inputs):
    torch.compiler.reset()
    assert_parity(torch.compile(operator, fullgraph=True, backend="aot_eager"), operator, inputs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"patches": torch.zeros(2, 72)}, ValueError, r"patches must have shape \[B, P, D\], but has \[2, 72\]"),
        ({"pos_embed": torch.zeros(9, 8)}, ValueError, r"pos_embed must have shape \[10, 8\], but has \[9, 8\]"),
        ({"visible_positions": torch.zeros(3, 4).long()}, ValueError, r"visible_positions must have shape \[2, V\]"),
        ({"visible_positions": torch.zeros(2, 4).int()}, TypeError, r"must be torch.int64, but is torch.int32"),
        ({"visible_positions": torch.tensor([[1, 2], [3, 3]])}, ValueError, r"lists 3 of picture 1 twice"),
        ({"visible_positions": torch.tensor([[1, 2], [3, 9]])}, ValueError, r"-1 or in 0..8, but one is 9"),
    ],
)
def test_keep_refuses_wrong_arguments_with_what_was_expected(change, error, message):
    with pytest.raises(error, match=message):
        keep_visible(**keep_visible_inputs(2, 9, 8, 4) | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 4, 8)}, ValueError, r"x must have shape \[2, 5, D\], but has \[2, 4, 8\]"),
        ({"mask_token": torch.zeros(1, 1, 8)}, ValueError, r"mask_token must have shape \[8\], but has \[1, 1, 8\]"),
        ({"pos_embed": torch.zeros(9, 8)}, ValueError, r"pos_embed must have shape \[10, 8\], but has \[9, 8\]"),
        ({"visible_positions": torch.tensor([[0, 1, 2, 9]] * 2)}, ValueError, r"-1 or in 0..8, but one is 9"),
        ({"visible_positions": torch.tensor([[0, 1, 2, -2]] * 2)}, ValueError, r"-1 or in 0..8, but one is -2"),
    ],
)
def test_restore_refuses_wrong_arguments_with_what_was_expected(change, error, message):
    with pytest.raises(error, match=message):
        restore_nine(**restore_tokens_inputs(2, 9, 8, 4) | change)
