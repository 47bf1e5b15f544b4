"""transformers' BEiT with our weights: the peer of a pre-training step."""

import torch
from torch import Tensor, nn

from fused_beit.engine.config import ModelSettings

from .rounds import AbsentError

# Our names (those of unilm) inside a block -> transformers' names inside a layer; q, k and v are split apart.
BLOCK = {
    "gamma_1": "lambda_1",
    "gamma_2": "lambda_2",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
OUTSIDE = {
    "encoder.cls_token": "beit.embeddings.cls_token",
    "encoder.mask_token": "beit.embeddings.mask_token",
    "encoder.patch_embed.proj": "beit.embeddings.patch_embeddings.projection",
    "encoder.rel_pos_bias": "beit.shared_position_bias",
    "encoder.norm": "layernorm",
    "lm_head": "lm_head",
}


def translate(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a `MaskedImageModel` under the names of `BeitForMaskedImageModeling`."""
    translated = {}
    for name, value in state.items():
        if name.startswith("encoder.blocks."):
            _, _, index, inner = name.split(".", 3)
            prefix = f"beit.layers.{index}"
            if inner == "attn.qkv.weight":
                for part, weight in zip("qkv", value.chunk(3), strict=True):
                    translated[f"{prefix}.attention.{part}_proj.weight"] = weight
            elif inner in ("attn.q_bias", "attn.v_bias"):
                translated[f"{prefix}.attention.{inner[5]}_proj.bias"] = value
            else:
                ours = next(ours for ours in BLOCK if inner == ours or inner.startswith(f"{ours}."))
                translated[f"{prefix}.{BLOCK[ours]}{inner.removeprefix(ours)}"] = value
        else:
            ours = next(ours for ours in OUTSIDE if name == ours or name.startswith(f"{ours}."))
            translated[f"{OUTSIDE[ours]}{name.removeprefix(ours)}"] = value
    return translated


def rename(name: str) -> str:
    """Our name of a parameter that is one of theirs too -> its name in `BeitForMaskedImageModeling`."""
    (translated,) = translate({name: torch.empty(0)})
    return translated


def build_peer(
    settings: ModelSettings, image_size: int, vocab_size: int, state: dict[str, Tensor], *, attention: str
) -> nn.Module:
    """`BeitForMaskedImageModeling` with our weights; `attention` is `sdpa` (its default) or `eager`.

    Raises:
        AbsentError: where transformers is not installed.
    """
    try:
        from transformers import BeitConfig, BeitForMaskedImageModeling
    except ImportError:
        raise AbsentError("not installed") from None

    config = BeitConfig(
        vocab_size=vocab_size,
        hidden_size=settings.width,
        num_hidden_layers=settings.depth,
        num_attention_heads=settings.num_heads,
        intermediate_size=int(settings.width * settings.mlp_ratio),
        layer_norm_eps=1e-6,
        image_size=image_size,
        patch_size=settings.patch_size,
        use_mask_token=True,
        use_shared_relative_position_bias=True,
        layer_scale_init_value=settings.layer_scale,
        drop_path_rate=settings.drop_path,
        attn_implementation=attention,
    )
    model = BeitForMaskedImageModeling(config)
    with torch.no_grad():
        model.load_state_dict(translate(state))
    return model.train()
