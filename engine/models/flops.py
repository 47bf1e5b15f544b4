"""Work and size of a pre-training, counted from its settings."""

from typing import NamedTuple

from ..config import ModelSettings, Recompute
from .encoder import hidden_width


class PartFlops(NamedTuple):
    """Floating point operations of one part of the model for one picture."""

    forward: float
    backward: float


def pretraining_flops_by_part(
    settings: ModelSettings, image_size: int, num_masked: int, vocab_size: int
) -> dict[str, PartFlops]:
    """Floating point operations of one pre-training step for one picture, by the part of the model that does them.

    A multiply-add counts 2. With P patches of p x p pixels, N = P+1 tokens, width D, MLP width C, depth L, M masked
    patches and V visual tokens, the forward pass does

        embed      2 P 3p^2 D
        attention  2 N L 3 D^2 + 2 T D^2 + 4 N^2 D L      qkv; projection; q k^T and attention times v
        mlp        2 T 2 D C                              fc1, fc2
        head       2 M D V                                on the masked tokens alone

    with T = N (L-1) + M tokens of all blocks after attention, for the loss reads M of the last block.

    The backward pass is two products for each of the forward's, but no gradient of the pixels is taken. Norms, GELU,
    softmax, the frozen tokenizer and what is computed twice to save memory do not count, by convention.
    """
    num_patches = (image_size // settings.patch_size) ** 2
    num_tokens = num_patches + 1
    width, depth = settings.width, settings.depth
    embed = float(2 * num_patches * 3 * settings.patch_size**2 * width)
    after_attention = num_tokens * (depth - 1) + num_masked
    products = 2 * num_tokens * depth * 3 * width**2 + 2 * after_attention * width**2
    attention = float(products + 4 * num_tokens**2 * width * depth)
    mlp = float(2 * after_attention * 2 * width * hidden_width(settings))
    head = float(2 * num_masked * width * vocab_size)
    rest = {"attention": attention, "mlp": mlp, "head": head}
    return {"embed": PartFlops(embed, embed)} | {name: PartFlops(flops, 2 * flops) for name, flops in rest.items()}


def pretraining_flops(settings: ModelSettings, image_size: int, num_masked: int, vocab_size: int) -> float:
    """All of `pretraining_flops_by_part`: one step for one picture, forward and backward."""
    parts = pretraining_flops_by_part(settings, image_size, num_masked, vocab_size)
    return sum(part.forward + part.backward for part in parts.values())


def recomputed_flops(
    settings: ModelSettings, image_size: int, num_masked: int, recompute: Recompute, *, zero_stage: int
) -> float:
    """Floating point operations for one picture that the backward pass repeats under `train.recompute`.

    It stops as soon as it has the last tensor that is needed: in an MLP fc2's input, before the product. At ZeRO stage
    3 DeepSpeed's own linear keeps its input after its product, so that this is repeated too. A block's last tensor
    comes after all of its products.

    None of it is in `pretraining_flops_by_part`.
    """
    if recompute == "none":
        return 0.0
    parts = pretraining_flops_by_part(settings, image_size, num_masked, 0)
    if recompute == "block":
        return parts["attention"].forward + parts["mlp"].forward
    return parts["mlp"].forward if zero_stage == 3 else parts["mlp"].forward / 2


def parameter_count(settings: ModelSettings, image_size: int, vocab_size: int) -> int:
    """Parameters of a `MaskedImageModel`, without building it."""
    grid = image_size // settings.patch_size
    width, hidden = settings.width, hidden_width(settings)
    table = ((2 * grid - 1) ** 2 + 3) * settings.num_heads
    norm = 2 * width
    attention = 3 * width**2 + 2 * width + width**2 + width  # no key bias
    mlp = 2 * width * hidden + hidden + width
    block = 2 * norm + attention + mlp
    if settings.layer_scale:
        block += 2 * width
    if settings.rel_pos_bias == "per_layer":
        block += table
    tokens = 2 * width + (3 * settings.patch_size**2 + 1) * width  # CLS, mask, patch embedding
    if settings.abs_pos_embed:
        tokens += (grid**2 + 1) * width
    if settings.rel_pos_bias == "shared":
        tokens += table
    return tokens + settings.depth * block + norm + (width + 1) * vocab_size
