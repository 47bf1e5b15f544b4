"""The encoder of BEiT: a pre-norm vision transformer with LayerScale and a learned relative position bias.

B pictures, S their side in pixels, P patches, N = P+1 tokens (CLS first), D channels of a token, H heads, K channels
of a head, C hidden channels of the MLP, M slots for masked patches (-1: empty), T tokens of a block after attention:
all N, or the M that are read of the last block.

Module and parameter names are those of the published code, so that its checkpoints read like ours. One differs: the
tables of `rel_pos_bias="per_layer"` are `blocks.i.attn.rel_pos_bias.relative_position_bias_table` here, a module of
the same kind as the shared one, and lack `rel_pos_bias` there.

Every parameter is read in the forward of the module that owns it, also where an operator spans two modules: that is
where ZeRO stage 3 has it gathered, compiled or not, in training or out of it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fused_beit.kernels import (
    Impl,
    RelativePositionBias,
    SharedBias,
    embed_tokens,
    gather_masked,
    rel_pos_attention,
    residual_add,
    residual_norm,
    resolve,
)
from fused_beit.kernels.precision import compute_dtype

from ..config import ModelSettings, Recompute

NORM_EPS = 1e-6
INIT_STD = 0.02
ATTENTION_ONLY = {Impl.SDPA, Impl.XFORMERS, Impl.FLEX}


def init_normal_(tensor: Tensor) -> None:
    """Normal with deviation 0.02, cut off at one deviation, as published for pre-training."""
    nn.init.trunc_normal_(tensor, std=INIT_STD, a=-INIT_STD, b=INIT_STD)


def impl_besides_attention(impl: str) -> str:
    """`impl` for the other operators: what only attention has leaves them at auto."""
    return "auto" if impl in ATTENTION_ONLY else impl


def call_or_checkpoint(module: nn.Module, *inputs: Any) -> Any:
    """A module's output; where `module.recomputed` is set, the backward pass finds its inputs alone and calls it again.

    Random states are not kept for that: nothing in a block draws from them, and dropped paths come with the inputs.
    """
    if not module.recomputed:
        return module(*inputs)
    return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False)


def rows_of(x_BND: Tensor, positions_BM: Tensor, impl: str) -> Tensor:
    """The tokens of these patches, zeros for empty slots: [B, N, D], int64 [B, M] -> [B, M, D]."""
    rows_RD = gather_masked(x_BND, positions_BM, None, None, impl=impl)
    return rows_RD.unflatten(0, positions_BM.shape)


class PatchProjection(nn.Conv2d):
    """The convolution whose kernel is its stride, computed as the matrix product that it is: faster on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """pixels [B, 3, S, S] -> patch embeddings [B, P, D]."""
        num_pictures, channels, height, width = input.shape
        patch = self.kernel_size[0]
        rows, columns = height // patch, width // patch
        patches = input.view(num_pictures, channels, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
        patches_BPE = patches.reshape(num_pictures, rows * columns, channels * patch * patch)
        return F.linear(patches_BPE, self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Non-overlapping patches, row by row, each through one linear map."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = PatchProjection(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, S, S] -> patch embeddings [B, P, D]."""
        return self.proj(pixels)


class QkvLinear(nn.Linear):
    """Query, key and value in one product, with a bias that is handed in: BEiT learns none for the keys."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 3 * width, bias=False)

    def forward(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(input, self.weight, bias)


def relative_position_bias(window: tuple[int, int], num_heads: int, impl: str) -> RelativePositionBias:
    """A table for a picture's patches and CLS, with kernels of its own where attention has them."""
    return RelativePositionBias(window, num_heads, impl=impl if impl in (Impl.REFERENCE, Impl.TRITON) else "auto")


class Attention(nn.Module):
    """Multi-head self-attention whose scores get a bias shared by all pictures."""

    k_bias: Tensor

    def __init__(self, width: int, num_heads: int, window: tuple[int, int] | None, impl: str) -> None:
        """`window`: sides of the grid of patches, for a table of this layer's own; None: the bias is handed in."""
        super().__init__()
        self.num_heads = num_heads
        self.impl = impl
        self.qkv = QkvLinear(width)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("k_bias", torch.zeros(width), persistent=False)
        self.rel_pos_bias = None if window is None else relative_position_bias(window, num_heads, impl)
        self.proj = nn.Linear(width, width)

    def forward(self, h_BND: Tensor, shared: SharedBias | None, read_BM: Tensor | None = None) -> Tensor:
        """[B, N, D], bias [H, N, N] or None, read_BM int64 [B, M] or None for all tokens -> [B, T, D]."""
        if self.rel_pos_bias is not None:  # as if it were shared, for the gradient of the table is then summed in fp32
            shared = self.rel_pos_bias.shared(compute_dtype(h_BND))
        qkv = self.qkv(h_BND, torch.cat([self.q_bias, self.k_bias, self.v_bias]))
        qkv_BN3HK = qkv.unflatten(-1, (3, self.num_heads, -1))
        attended_BTD = rel_pos_attention(qkv_BN3HK, shared, impl=self.impl)
        if read_BM is not None:
            attended_BTD = rows_of(attended_BTD, read_BM, impl_besides_attention(self.impl))
        return self.proj(attended_BTD)


class Mlp(nn.Module):
    """Linear, GELU (the exact one), linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.recomputed = False
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, h_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        return self.fc2(F.gelu(self.fc1(h_BTD)))


class ResidualNorm(nn.LayerNorm):
    """LayerNorm in one pass with the residual before it: LayerScale, DropPath, add, norm."""

    def __init__(self, width: int, impl: str) -> None:
        super().__init__(width, eps=NORM_EPS)
        self.impl = impl

    def forward(  # type: ignore[override]  # a norm of a sum
        self, x_BTD: Tensor, y_BTD: Tensor, gamma_D: Tensor | None, keep_B: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """x, y [B, T, D], gamma [D], keep [B] -> x_new = x + keep * gamma * y and the norm of x_new."""
        return residual_norm(x_BTD, y_BTD, gamma_D, keep_B, self.weight, self.bias, eps=self.eps, impl=self.impl)


class FinalNorm(ResidualNorm):
    """ResidualNorm, or LayerNorm of what is summed already."""

    def forward(
        self, x_BTD: Tensor, y_BTD: Tensor | None = None, gamma_D: Tensor | None = None, keep_B: Tensor | None = None
    ) -> Any:
        """As ResidualNorm; x [B, T, D] alone -> its norm [B, T, D]."""
        if y_BTD is None:
            return nn.LayerNorm.forward(self, x_BTD)
        return super().forward(x_BTD, y_BTD, gamma_D, keep_B)


class Block(nn.Module):
    """Attention and MLP, each with LayerScale, DropPath and residual.

    It takes its input normed already and has it normed for the next block, so that each residual and the norm after
    it are one pass over the tokens. After attention no token needs the others: where only some patches are read of a
    block, the rest of it is done for these alone.
    """

    def __init__(self, settings: ModelSettings, window: tuple[int, int] | None, impl: str, *, first: bool) -> None:
        """`first`: no residual comes before its first norm."""
        super().__init__()
        width = settings.width
        self.recomputed = False
        self.impl = impl_besides_attention(impl)
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS) if first else ResidualNorm(width, self.impl)
        self.attn = Attention(width, settings.num_heads, window, impl)
        self.norm2 = ResidualNorm(width, self.impl)
        self.mlp = Mlp(width, hidden_width(settings))
        self.gamma_1: nn.Parameter | None = None
        self.gamma_2: nn.Parameter | None = None
        if settings.layer_scale:
            self.gamma_1 = nn.Parameter(torch.full((width,), settings.layer_scale))
            self.gamma_2 = nn.Parameter(torch.full((width,), settings.layer_scale))

    def forward(
        self,
        x_BND: Tensor,
        h_BND: Tensor,
        bias: SharedBias | None,
        keep_2B: Tensor | None,
        next_norm: nn.Module | None,
        read_BM: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Residual stream x and h = norm1(x) -> the new x [B, T, D], and its next norm or None where none follows.

        keep_2B:   DropPath's factors of the attention and of the MLP branch
        next_norm: norm1 of the next block, or the final norm
        read_BM:   int64 [B, M], the patches that are read of this block, -1: empty slot; None: all tokens
        """
        keep_attn, keep_mlp = (None, None) if keep_2B is None else keep_2B.unbind(0)
        y_BTD = self.attn(h_BND, bias, read_BM)
        x_BTD = x_BND if read_BM is None else rows_of(x_BND, read_BM, self.impl)
        x_BTD, h_BTD = self.norm2(x_BTD, y_BTD, self.gamma_1, keep_attn)
        y_BTD = call_or_checkpoint(self.mlp, h_BTD)
        if next_norm is None:
            return residual_add(x_BTD, y_BTD, self.gamma_2, keep_mlp, impl=self.impl), None
        return next_norm(x_BTD, y_BTD, self.gamma_2, keep_mlp)


class Encoder(nn.Module):
    """BEiT's encoder (arXiv:2106.08254, section 2.2), initialised from torch's generator as published.

    settings:   shape of the model
    image_size: S, side of its pictures in pixels; a multiple of the patch size
    impl:       implementation of the operators; sdpa, xformers and flex concern attention alone
    Raises ImplUnavailable for an `impl` that an operator does not have, ValueError for sides that do not divide.

    `drop_path_rates` [depth] holds the share of pictures that each block drops, for `keep_scales`.
    """

    drop_path_rates: Tensor

    def __init__(self, settings: ModelSettings, image_size: int, *, impl: str = "auto") -> None:
        super().__init__()
        width, depth = settings.width, settings.depth
        if image_size % settings.patch_size or width % settings.num_heads:
            raise ValueError(
                f"Encoder: expected image_size to be a multiple of patch_size and width of num_heads, but got "
                f"{image_size}, {settings.patch_size} and {width}, {settings.num_heads}"
            )
        self.impl = impl_besides_attention(impl)
        for operator in ("embed_tokens", "residual_norm", "residual_add", "gather_masked"):
            resolve(operator, self.impl, None)  # an unknown name is refused here, not in the first step
        resolve("rel_pos_attention", impl, None)
        self.image_size = image_size
        self.grid = image_size // settings.patch_size
        window = (self.grid, self.grid)
        own_window = window if settings.rel_pos_bias == "per_layer" else None

        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.patch_embed = PatchEmbed(settings.patch_size, width)
        self.pos_embed: nn.Parameter | None = None
        if settings.abs_pos_embed:
            self.pos_embed = nn.Parameter(torch.empty(1, self.grid**2 + 1, width))
        self.rel_pos_bias: RelativePositionBias | None = None
        if settings.rel_pos_bias == "shared":
            self.rel_pos_bias = relative_position_bias(window, settings.num_heads, impl)
        self.blocks = nn.ModuleList(Block(settings, own_window, impl, first=layer == 0) for layer in range(depth))
        self.norm = FinalNorm(width, self.impl)
        self.register_buffer("drop_path_rates", torch.linspace(0, settings.drop_path, depth), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Published initialisation: biases 0, the rest normal, what ends a branch of block l divided by sqrt(2 l)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                init_normal_(module.weight)
                if module.bias is not None:
                    module.bias.zero_()
        for tensor in (self.cls_token, self.mask_token, self.pos_embed):
            if tensor is not None:
                init_normal_(tensor)
        for layer, block in enumerate(self.blocks, start=1):
            assert isinstance(block, Block)
            block.attn.proj.weight.div_((2 * layer) ** 0.5)
            block.mlp.fc2.weight.div_((2 * layer) ** 0.5)

    def recompute(self, what: Recompute) -> None:
        """Let the backward pass compute again what is within each MLP or block, from its inputs, instead of keeping it.

        Values and gradients stay the same bits. A pass without gradients keeps nothing and repeats nothing.
        """
        for block in self.blocks:
            assert isinstance(block, Block)
            block.recomputed, block.mlp.recomputed = what == "block", what == "mlp"

    def forward(
        self,
        pixels: Tensor,
        masked_positions: Tensor | None = None,
        keep: Tensor | None = None,
        *,
        read_masked: bool = False,
    ) -> Tensor:
        """Tokens before the final norm, which belongs to whoever reads them; or the masked ones alone after it.

        pixels:           [B, 3, S, S]      floating point, normalised
        masked_positions: int64 [B, M]      patches replaced by the mask token, -1: empty slot; None: nothing masked
        keep:             [depth, 2, B]     DropPath's factors of the attention and MLP branches; None: nothing dropped
        read_masked:      whether only the masked patches are read: the last block does no more than these need
        ->                [B, P+1, D]       CLS first; fp32 under autocast too
                          [B*M, D]          with read_masked: normed, under autocast in its dtype; those of empty slots
                                            mean nothing
        Raises ValueError for pictures of another size, or where masked patches are to be read and there are none.
        """
        if read_masked and masked_positions is None:
            raise ValueError("Encoder: read_masked needs masked_positions, but they are None; give them, or read all")
        side = self.image_size
        if pixels.shape[1:] != (3, side, side):
            raise ValueError(f"Encoder: expected pixels [B, 3, {side}, {side}], but got {list(pixels.shape)}")
        x_BND = embed_tokens(
            self.patch_embed(pixels),
            self.mask_token.flatten(),
            self.cls_token.flatten(),
            None if self.pos_embed is None else self.pos_embed.squeeze(0),
            masked_positions,
            impl=self.impl,
        )
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias.shared(compute_dtype(x_BND))
        norms = [block.get_submodule("norm1") for block in self.blocks]
        h_BND = norms[0](x_BND)
        for layer, block in enumerate(self.blocks):
            keep_2B = None if keep is None else keep[layer]
            next_norm, read_BM = None, None
            if layer + 1 < len(norms):
                next_norm = norms[layer + 1]
            elif read_masked:
                next_norm, read_BM = self.norm, masked_positions
            x_BND, h_BND = call_or_checkpoint(block, x_BND, h_BND, bias, keep_2B, next_norm, read_BM)
        return h_BND.flatten(0, 1) if read_masked else x_BND

    def compile_blocks(self) -> None:
        """Have `torch.compile` compile the blocks when they are first called, all of one kind once.

        For fixed shapes: each new number of pictures is compiled anew.
        """
        for block in self.blocks:
            block.compile(dynamic=False)

    def features(self, pixels: Tensor) -> Tensor:
        """Normed tokens of whole pictures: [B, 3, S, S] -> [B, P+1, D]."""
        return self.norm(self(pixels))


def hidden_width(settings: ModelSettings) -> int:
    """Hidden channels of the MLP."""
    return int(settings.width * settings.mlp_ratio)
