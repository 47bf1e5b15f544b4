"""Our model against transformers' BEiT with the same weights: hidden states, logits, loss and gradients."""

import pytest
import torch

from fused_beit.engine.config import ModelSettings
from fused_beit.engine.models import MaskedImageModel

transformers = pytest.importorskip("transformers")

VOCAB = 11
TINY = {"width": 16, "depth": 2, "num_heads": 2, "patch_size": 16}
FORMS = {
    "shared": {"rel_pos_bias": "shared"},
    "per_layer": {"rel_pos_bias": "per_layer"},
    "absolute": {"rel_pos_bias": "none", "abs_pos_embed": True},
}


def peer_config(settings: ModelSettings, image_size: int):
    return transformers.BeitConfig(
        vocab_size=VOCAB,
        hidden_size=settings.width,
        num_hidden_layers=settings.depth,
        num_attention_heads=settings.num_heads,
        intermediate_size=int(settings.width * settings.mlp_ratio),
        image_size=image_size,
        patch_size=settings.patch_size,
        layer_norm_eps=1e-6,
        use_mask_token=True,
        use_absolute_position_embeddings=settings.abs_pos_embed,
        use_shared_relative_position_bias=settings.rel_pos_bias == "shared",
        use_relative_position_bias=settings.rel_pos_bias == "per_layer",
        layer_scale_init_value=settings.layer_scale,
        drop_path_rate=0.0,
        attn_implementation="sdpa",  # the eager one rounds float64 scores to fp32
    )


def to_peer_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors named as our parameters -> named as transformers'; q, k and v apart, which have no bias for k."""
    exact = {
        "encoder.cls_token": "beit.embeddings.cls_token",
        "encoder.mask_token": "beit.embeddings.mask_token",
        "encoder.pos_embed": "beit.embeddings.position_embeddings",
    }
    parts = {
        "lm_head.": "lm_head.",
        "encoder.norm.": "layernorm.",
        "encoder.patch_embed.proj.": "beit.embeddings.patch_embeddings.projection.",
        "encoder.rel_pos_bias.": "beit.shared_position_bias.",
        "encoder.blocks.": "beit.layers.",
        "gamma_": "lambda_",
        "norm1.": "layernorm_before.",
        "norm2.": "layernorm_after.",
        "attn.rel_pos_bias.": "relative_position_bias.",
        "attn.proj.": "attention.o_proj.",
        "attn.q_bias": "attention.q_proj.bias",
        "attn.v_bias": "attention.v_proj.bias",
        "attn.qkv.": "attention.qkv.",
    }
    renamed = {}
    for name, tensor in tensors.items():
        if name in exact:
            renamed[exact[name]] = tensor
            continue
        for ours, theirs in parts.items():
            name = name.replace(ours, theirs)
        if "attention.qkv." in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace("qkv", f"{letter}_proj")] = part
        else:
            renamed[name] = tensor
    return renamed


def model_and_peer(form: str, image_size: int, **settings):
    """Our model with every parameter random, and transformers' with the same weights; float64."""
    torch.manual_seed(0)
    shape = ModelSettings(**(TINY | FORMS[form] | settings))
    model = MaskedImageModel(shape, image_size, VOCAB, normalize="inception").double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    peer = transformers.BeitForMaskedImageModeling(peer_config(shape, image_size)).double()
    peer.load_state_dict(to_peer_names(model.state_dict()), strict=True)
    return model.eval(), peer.eval()


def batch(image_size: int, num_masked: int):
    """Pictures, sorted masked positions (the order in which a boolean mask gathers), visual tokens, boolean mask."""
    generator = torch.Generator().manual_seed(1)
    num_patches = (image_size // 16) ** 2
    pictures = torch.randint(0, 256, (2, 3, image_size, image_size), generator=generator, dtype=torch.uint8)
    positions = torch.rand(2, num_patches, generator=generator).argsort(1)[:, :num_masked].sort(1).values
    tokens = torch.randint(0, VOCAB, (2, num_patches), generator=generator)
    mask = torch.zeros(2, num_patches, dtype=torch.bool).scatter(1, positions, True)
    return pictures, positions, tokens, mask


def hidden_states(model: MaskedImageModel, pictures, positions) -> list[torch.Tensor]:
    """Residual stream after every block."""
    states: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _module, _inputs, output: states.append(output[0]))
        for block in model.encoder.blocks
    ]
    model.encoder(model.normalize(pictures), positions)
    for hook in hooks:
        hook.remove()
    return states


@pytest.mark.parametrize("image_size", [64, 224])
@pytest.mark.parametrize("form", FORMS)
def test_hidden_states_are_those_of_transformers(form, image_size):
    model, peer = model_and_peer(form, image_size)
    model, peer = model.float(), peer.float()
    pictures, positions, _, mask = batch(image_size, 5)
    with torch.no_grad():
        ours = hidden_states(model, pictures, positions)
        theirs = peer(model.normalize(pictures), bool_masked_pos=mask, output_hidden_states=True).hidden_states
    assert len(theirs) == len(ours) + 1  # theirs begin with the embeddings
    for state, expected in zip(ours, theirs[1:], strict=True):
        assert expected.std() > 0.5
        torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_logits_at_masked_positions_are_those_of_transformers(form):
    model, peer = model_and_peer(form, 64)
    pictures, positions, _, mask = batch(64, 5)
    with torch.no_grad():
        logits = model.logits(pictures, positions)
        expected = peer(model.normalize(pictures), bool_masked_pos=mask).logits[mask].view_as(logits)
    torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("image_size", [64, 224])
@pytest.mark.parametrize("form", [*FORMS, "without_layer_scale"])
def test_loss_and_all_gradients_are_those_of_transformers(form, image_size):
    plain = form == "without_layer_scale"
    model, peer = model_and_peer("shared" if plain else form, image_size, layer_scale=0.0 if plain else 0.1)
    pictures, positions, tokens, mask = batch(image_size, 5)

    loss = model(pictures, positions, tokens).loss
    loss.backward()
    expected = peer(model.normalize(pictures), bool_masked_pos=mask, labels=tokens[mask]).loss
    expected.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    gradients = to_peer_names({name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients.keys() == {name for name, _ in peer.named_parameters()}
    for name, parameter in peer.named_parameters():
        scale = parameter.grad.abs().max()
        assert scale > 0, name
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=1e-11 * scale.item(), msg=name)


def test_logits_under_bf16_autocast_are_no_worse_than_those_of_transformers():
    model, peer = model_and_peer("shared", 224)
    pictures, positions, _, mask = batch(224, 75)
    with torch.no_grad():
        exact = model.logits(pictures, positions)
        model, peer = model.float(), peer.float()
        with torch.autocast("cpu", torch.bfloat16):
            ours = model.logits(pictures, positions)
            theirs = peer(model.normalize(pictures), bool_masked_pos=mask).logits[mask].view_as(ours)
    assert ours.dtype == torch.bfloat16

    def error(logits):
        return (logits.double() - exact).square().mean().sqrt()

    rounding = torch.finfo(torch.bfloat16).eps * exact.square().mean().sqrt()
    assert error(ours) <= 2 * error(theirs) + rounding
    assert error(ours) > 0
