"""The encoder: names, initialisation, sizes, what is computed once, and who reads which parameter."""

import math

import pytest
import torch
from torch import nn

from fused_beit.engine.config import ModelSettings
from fused_beit.engine.models import Encoder, MaskedImageModel
from fused_beit.kernels import ImplUnavailable, RelativePositionBias

SHAPE = ModelSettings(patch_size=4, width=16, depth=3, num_heads=2)
BLOCK_NAMES = {
    *("gamma_1", "gamma_2", "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"),
    *("attn.q_bias", "attn.v_bias", "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias"),
    *("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"),
}
OUTER_NAMES = {
    "cls_token",
    "mask_token",
    "patch_embed.proj.weight",
    "patch_embed.proj.bias",
    "norm.weight",
    "norm.bias",
}
TABLE = "rel_pos_bias.relative_position_bias_table"


def changed(**settings) -> ModelSettings:
    return SHAPE.model_copy(update=settings)


@pytest.mark.parametrize(
    ("settings", "added", "removed"),
    [
        ({"rel_pos_bias": "shared"}, {TABLE}, set()),
        ({"rel_pos_bias": "per_layer"}, {f"blocks.{layer}.attn.{TABLE}" for layer in range(3)}, set()),
        ({"rel_pos_bias": "none", "abs_pos_embed": True}, {"pos_embed"}, set()),
        ({"layer_scale": 0.0}, {TABLE}, {f"blocks.{layer}.gamma_{n}" for layer in range(3) for n in (1, 2)}),
    ],
)
def test_state_dict_has_the_published_names_and_nothing_else(settings, added, removed):
    names = OUTER_NAMES | {f"blocks.{layer}.{name}" for layer in range(3) for name in BLOCK_NAMES}
    assert set(Encoder(changed(**settings), 32).state_dict()) == (names | added) - removed


def assert_is_cut_off_normal(tensor: torch.Tensor, limit: float) -> None:
    """A normal cut off at one deviation has 0.5396 of that deviation, which is its limit."""
    deviation = limit * math.sqrt(1 - 2 * math.exp(-0.5) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(0.5)))
    assert tensor.abs().max() <= limit * (1 + 1e-6)
    spread = 5 * deviation / math.sqrt(tensor.numel())  # five standard errors, more than those of the deviation
    assert abs(tensor.mean().item()) <= spread
    assert abs(tensor.std().item() - deviation) <= spread


def test_initial_weights_are_as_published():
    torch.manual_seed(0)
    settings = ModelSettings(width=96, depth=3, num_heads=2, abs_pos_embed=True, layer_scale=0.3)
    model = MaskedImageModel(settings, 64, 200, normalize="inception")
    encoder = model.encoder
    for tensor in (encoder.patch_embed.proj.weight, encoder.pos_embed, model.lm_head.weight):
        assert_is_cut_off_normal(tensor, 0.02)
    for tensor in (encoder.cls_token, encoder.mask_token):
        assert 0 < tensor.abs().max() <= 0.02
    assert not encoder.rel_pos_bias.relative_position_bias_table.any()
    for layer, block in enumerate(encoder.blocks, start=1):
        assert_is_cut_off_normal(block.attn.qkv.weight, 0.02)
        assert_is_cut_off_normal(block.mlp.fc1.weight, 0.02)
        assert_is_cut_off_normal(block.attn.proj.weight, 0.02 / math.sqrt(2 * layer))
        assert_is_cut_off_normal(block.mlp.fc2.weight, 0.02 / math.sqrt(2 * layer))
        assert (block.gamma_1 == torch.tensor(0.3)).all()
        assert (block.gamma_2 == torch.tensor(0.3)).all()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name


def test_initial_weights_follow_from_the_seed():
    def weights(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        return list(MaskedImageModel(SHAPE, 16, 9, normalize="inception").parameters())

    assert all(torch.equal(a, b) for a, b in zip(weights(1), weights(1), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(1), weights(2), strict=True))


@pytest.mark.parametrize(("image_size", "patch_size"), [(96, 16), (160, 16), (32, 4)])
@pytest.mark.parametrize("rel_pos_bias", ["shared", "per_layer", "none"])
def test_pictures_of_other_sizes_give_a_token_for_every_patch(image_size, patch_size, rel_pos_bias):
    encoder = Encoder(changed(patch_size=patch_size, rel_pos_bias=rel_pos_bias), image_size)
    x = encoder(torch.rand(2, 3, image_size, image_size), torch.tensor([[0, 1], [2, -1]]))
    assert x.shape == (2, (image_size // patch_size) ** 2 + 1, 16)
    assert x.isfinite().all()


def test_patch_embedding_is_the_convolution_of_its_weight():
    proj = Encoder(SHAPE, 32).patch_embed.double()
    pixels = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    expected = nn.functional.conv2d(pixels, proj.proj.weight, proj.proj.bias, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(proj(pixels), expected, rtol=1e-13, atol=1e-13)


def test_features_are_the_normed_tokens():
    encoder = Encoder(SHAPE, 16)
    nn.init.normal_(encoder.norm.weight)
    pixels = torch.rand(2, 3, 16, 16)
    expected = nn.functional.layer_norm(encoder(pixels), (16,), encoder.norm.weight, encoder.norm.bias, 1e-6)
    torch.testing.assert_close(encoder.features(pixels), expected)


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("drops_paths", [True, False])
@pytest.mark.parametrize(
    "settings", [{}, {"depth": 1}, {"rel_pos_bias": "per_layer"}, {"rel_pos_bias": "none", "layer_scale": 0.0}], ids=str
)
def test_masked_rows_and_all_gradients_are_those_of_the_whole_encoder(settings, drops_paths, impl):
    torch.manual_seed(0)
    encoder = Encoder(changed(**settings), 16, impl=impl).double()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    pixels = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    positions = torch.tensor([[5, 0, -1, 15], [-1, 3, 9, 2], [-1, -1, -1, -1]])
    keep = torch.tensor([0.0, 1.0, 1.5], dtype=torch.float64).expand(len(encoder.blocks), 2, 3) if drops_paths else None
    picture, slot = (positions >= 0).nonzero(as_tuple=True)
    cotangent = torch.randn(len(picture), 16, dtype=torch.float64)

    whole = encoder.norm(encoder(pixels, positions, keep))[picture, 1 + positions[picture, slot]]
    rows = encoder(pixels, positions, keep, read_masked=True).unflatten(0, positions.shape)[picture, slot]
    torch.testing.assert_close(rows, whole, rtol=1e-11, atol=1e-11)
    for found, expected in zip(
        *(torch.autograd.grad(out, list(encoder.parameters()), cotangent) for out in (rows, whole)), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_of_the_last_block_the_masked_patches_alone_leave_attention():
    encoder = Encoder(SHAPE, 16)
    seen = []
    for block in encoder.blocks:
        for module in (block.attn.qkv, block.attn.proj, block.mlp):
            module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].shape[1]))
    encoder(torch.rand(2, 3, 16, 16), torch.tensor([[0, 1, 5], [2, -1, -1]]), read_masked=True)
    assert seen == [17, 17, 17, 17, 17, 17, 17, 3, 3]


def test_masked_patches_cannot_be_read_where_none_are_given():
    with pytest.raises(ValueError, match="read_masked needs masked_positions"):
        Encoder(SHAPE, 16)(torch.rand(2, 3, 16, 16), read_masked=True)


@pytest.mark.parametrize(("rel_pos_bias", "calls"), [("shared", 1), ("per_layer", 3), ("none", 0)])
def test_each_bias_table_is_expanded_once_in_a_forward(rel_pos_bias, calls):
    encoder = Encoder(changed(rel_pos_bias=rel_pos_bias), 16)
    seen = []
    for module in encoder.modules():
        if isinstance(module, RelativePositionBias):
            module.register_forward_hook(lambda module, _inputs, _output: seen.append(module))
    encoder(torch.rand(2, 3, 16, 16))
    assert len(seen) == len(set(seen)) == calls


def test_residual_stream_stays_fp32_and_branches_get_bf16_under_autocast():
    encoder = Encoder(SHAPE, 16)
    dtypes = {}
    for name, module in encoder.named_modules():
        if name.endswith((".attn", ".mlp")):
            module.register_forward_pre_hook(lambda _module, inputs, name=name: dtypes.update({name: inputs[0].dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        x = encoder(torch.rand(2, 3, 16, 16))
    assert x.dtype == torch.float32
    dtypes.pop("blocks.0.attn")  # its norm is torch's own, whose dtype is torch's choice
    assert set(dtypes.values()) == {torch.bfloat16}


class OwnersOnly:
    """Empties every parameter, and fills it only while the module that owns it runs, as ZeRO stage 3 does."""

    def __init__(self, model: nn.Module) -> None:
        for module in model.modules():
            own = {parameter: parameter.data for parameter in module.parameters(recurse=False)}
            for parameter in own:
                parameter.data = torch.empty(0)
            module.register_forward_pre_hook(lambda _module, _inputs, own=own: self.fill(own))
            module.register_forward_hook(lambda _module, _inputs, _output, own=own: self.empty(own))

    def fill(self, own: dict[nn.Parameter, torch.Tensor]) -> None:
        for parameter, values in own.items():
            parameter.data = values

    def empty(self, own: dict[nn.Parameter, torch.Tensor]) -> None:
        for parameter in own:
            parameter.data = torch.empty(0)


@pytest.mark.parametrize("rel_pos_bias", ["shared", "per_layer"])
@torch.no_grad()
def test_every_parameter_is_read_by_the_module_that_owns_it(rel_pos_bias):
    model = MaskedImageModel(changed(rel_pos_bias=rel_pos_bias, abs_pos_embed=True), 16, 9, normalize="inception")
    pictures, positions = torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.tensor([[0, 3], [2, -1]])
    arguments = pictures, positions, torch.zeros(2, 16, dtype=torch.int64)
    expected = model(*arguments).loss, model.logits(pictures, positions), model.encoder.features(pictures.float())
    OwnersOnly(model)
    found = model(*arguments).loss, model.logits(pictures, positions), model.encoder.features(pictures.float())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(RuntimeError):
        nn.functional.linear(torch.zeros(1, 16), model.lm_head.weight)


@pytest.mark.parametrize(("image_size", "update"), [(18, {}), (16, {"num_heads": 3})])
def test_sizes_that_do_not_divide_are_refused(image_size, update):
    with pytest.raises(ValueError, match="multiple"):
        Encoder(changed(**update), image_size)


def test_pictures_of_an_unexpected_size_are_refused():
    with pytest.raises(ValueError, match=r"\[B, 3, 16, 16\], but got \[2, 3, 20, 20\]"):
        Encoder(SHAPE, 16)(torch.zeros(2, 3, 20, 20))


@pytest.mark.parametrize("impl", ["nonsense"])
def test_an_implementation_that_does_not_exist_is_refused_when_the_model_is_built(impl):
    with pytest.raises(ImplUnavailable, match=impl):
        MaskedImageModel(SHAPE, 16, 9, normalize="inception", impl=impl)


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_a_named_implementation_of_attention_leaves_the_result_alone(impl):
    def output(impl: str) -> torch.Tensor:
        torch.manual_seed(0)
        encoder = Encoder(SHAPE, 16, impl=impl).double()
        nn.init.normal_(encoder.rel_pos_bias.relative_position_bias_table)
        return encoder(torch.linspace(0, 1, 2 * 3 * 16 * 16, dtype=torch.float64).view(2, 3, 16, 16))

    torch.testing.assert_close(output(impl), output("auto"), rtol=1e-12, atol=1e-12)
