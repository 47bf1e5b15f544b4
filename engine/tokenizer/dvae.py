"""The discrete VAE whose codes are predicted: DALL-E's architecture in any size.

Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation", appendix A; with width 256, 4 groups, 2 blocks and 8192 codes
the encoder is the published one, parameter for parameter.

Shapes: B pictures, T side of the token view, G = T / stride tokens a side, V codes, D channels before the last layer,
R = B * G * G rows.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_beit.kernels import nearest_code

from .flops import TokenizerSize

PIXEL_EPS = 0.1
"""Pixels are moved into [eps, 1 - eps], where the logit of the logit-Laplace distribution is finite (appendix A.3)."""


def map_pixels(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] to [eps, 1 - eps]."""
    return pixels * (1 - 2 * PIXEL_EPS) + PIXEL_EPS


def unmap_pixels(mapped: Tensor) -> Tensor:
    """The inverse of `map_pixels`, cut to [0, 1]."""
    return ((mapped - PIXEL_EPS) / (1 - 2 * PIXEL_EPS)).clamp(0, 1)


class Block(nn.Module):
    """`id_path(x) + gain * res_path(x)`: four convolutions, each after a ReLU, through a quarter of the channels.

    `kernels` are the sides of the four convolutions: 3, 3, 3, 1 in the encoder and 1, 3, 3, 3 in the decoder.
    """

    def __init__(self, n_in: int, n_out: int, kernels: Sequence[int], gain: float) -> None:
        super().__init__()
        n_hidden = n_out // 4
        widths = (n_in, n_hidden, n_hidden, n_hidden, n_out)
        self.gain = gain
        self.id_path = nn.Identity() if n_in == n_out else nn.Conv2d(n_in, n_out, 1)
        self.convs = nn.ModuleList(
            nn.Conv2d(widths[i], widths[i + 1], side, padding=side // 2) for i, side in enumerate(kernels)
        )

    def forward(self, x: Tensor) -> Tensor:
        branch = x
        for conv in self.convs:
            branch = conv(F.relu(branch))
        return self.id_path(x) + self.gain * branch


def make_groups(n_in: int, widths: Sequence[int], num_blocks: int, kernels: Sequence[int]) -> nn.ModuleList:
    """Groups of `num_blocks` blocks; the first block of a group changes the width."""
    gain = 1 / (len(widths) * num_blocks) ** 2
    befores = (n_in, *widths[:-1])
    return nn.ModuleList(
        nn.Sequential(*(Block(before if i == 0 else width, width, kernels, gain) for i in range(num_blocks)))
        for before, width in zip(befores, widths, strict=True)
    )


class Encoder(nn.Module):
    """Pixels to code logits; each group after the first halves the picture and doubles the channels."""

    def __init__(self, vocab_size: int, width: int, groups: int, blocks_per_group: int) -> None:
        super().__init__()
        widths = [width * 2**g for g in range(groups)]
        self.input = nn.Conv2d(3, width, 7, padding=3)
        self.groups = make_groups(width, widths, blocks_per_group, (3, 3, 3, 1))
        self.output = nn.Conv2d(widths[-1], vocab_size, 1)

    def features(self, pixels: Tensor) -> Tensor:
        """Mapped pixels `[B, 3, T, T]` to what the last layer reads, `[B, D, G, G]`."""
        x = self.input(pixels)
        for i, group in enumerate(self.groups):
            x = group(F.max_pool2d(x, 2) if i else x)
        return F.relu(x)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.output(self.features(pixels))


class Decoder(nn.Module):
    """Codes, one-hot or soft, to the parameters of each pixel's distribution; the encoder's mirror image."""

    def __init__(self, vocab_size: int, width: int, groups: int, blocks_per_group: int, output_channels: int) -> None:
        super().__init__()
        widths = [width * 2**g for g in reversed(range(groups))]
        n_init = width // 2
        self.input = nn.Conv2d(vocab_size, n_init, 1)
        self.groups = make_groups(n_init, widths, blocks_per_group, (1, 3, 3, 3))
        self.output = nn.Conv2d(width, output_channels, 1)

    def embed(self, token_ids_BGG: Tensor) -> Tensor:
        """The first layer on one-hot codes, as a look-up: `[B, n_init, G, G]`."""
        assert self.input.bias is not None
        rows_BGGD = F.embedding(token_ids_BGG, self.input.weight[:, :, 0, 0].T) + self.input.bias
        return rows_BGGD.permute(0, 3, 1, 2)

    def from_embedded(self, x: Tensor) -> Tensor:
        for i, group in enumerate(self.groups):
            x = group(F.interpolate(x, scale_factor=2, mode="nearest") if i else x)
        return self.output(F.relu(x))

    def forward(self, codes_BVGG: Tensor) -> Tensor:
        return self.from_embedded(self.input(codes_BVGG))


class DiscreteVAE(nn.Module):
    """Pictures to a grid of codes and back.

    Args:
        vocab_size: number of codes.
        width: channels of the first group (256 as published); a multiple of 4.
        groups: groups of blocks; a token covers `2 ** (groups - 1)` pixels a side.
        blocks_per_group: residual blocks in a group.
        output_channels: 6 for the mean and log-scale of a logit-Laplace distribution, 3 for the mean alone, 0 for a
            tokenizer that cannot decode.

    `impl` is the implementation of `nearest_code` that `encode` uses.
    """

    impl = "auto"

    def __init__(
        self, vocab_size: int, width: int, groups: int, blocks_per_group: int, *, output_channels: int = 6
    ) -> None:
        super().__init__()
        if width % 4 or width < 4:
            raise ValueError(f"width = {width} must be a multiple of 4: a block works in a quarter of its channels")
        if output_channels not in (0, 3, 6):
            raise ValueError(f"output_channels = {output_channels} must be 0, 3 or 6")
        self.vocab_size = vocab_size
        self.width = width
        self.num_groups = groups
        self.blocks_per_group = blocks_per_group
        self.output_channels = output_channels
        self.encoder = Encoder(vocab_size, width, groups, blocks_per_group)
        self.decoder = (
            Decoder(vocab_size, width, groups, blocks_per_group, output_channels) if output_channels else None
        )
        self.apply(init_conv)

    @property
    def stride(self) -> int:
        """Pixels that a token covers along one side."""
        return 2 ** (self.num_groups - 1)

    @property
    def has_decoder(self) -> bool:
        """Whether `decode` works; false for a published encoder alone."""
        return self.decoder is not None

    @property
    def sizes(self) -> dict[str, int]:
        """The constructor's arguments."""
        return {
            "vocab_size": self.vocab_size,
            "width": self.width,
            "groups": self.num_groups,
            "blocks_per_group": self.blocks_per_group,
            "output_channels": self.output_channels,
        }

    @property
    def encoder_size(self) -> TokenizerSize:
        """What the work of `encode` is counted from."""
        return TokenizerSize(self.vocab_size, self.width, self.num_groups, self.blocks_per_group)

    def prepare(self, pixels: Tensor) -> Tensor:
        """uint8 0 to 255, or float in [0, 1], to mapped pixels in the dtype of the weights."""
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] % self.stride or pixels.shape[3] % self.stride:
            raise ValueError(
                f"expected pixels [B, 3, T, T] with T a multiple of the stride {self.stride}, got {list(pixels.shape)}"
            )
        if pixels.dtype == torch.uint8:
            pixels = pixels.float() / 255
        return map_pixels(pixels).to(self.encoder.input.weight.dtype)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """The likeliest code of each cell; the logits `[B, V, G, G]` are never stored.

        Args:
            pixels: `[B, 3, T, T]`, uint8 or float in [0, 1]; any memory format.

        Returns:
            int64 `[B, G * G]`, row by row.

        Under autocast the codes are rounded as what they are compared with is; their scores are sums in fp32 always.
        """
        # With the channels of a pixel side by side convolutions are faster, and rows need no copy afterwards.
        prepared = self.prepare(pixels).contiguous(memory_format=torch.channels_last)
        hidden_RD = self.encoder.features(prepared).permute(0, 2, 3, 1).flatten(0, 2)
        last = self.encoder.output
        codes_VD = last.weight.flatten(1).to(hidden_RD.dtype)
        index_R = nearest_code(hidden_RD, codes_VD, last.bias, impl=self.impl).index
        return index_R.view(pixels.shape[0], -1)

    @torch.no_grad()
    def decode(self, token_ids_BGG: Tensor) -> Tensor:
        """The mean picture of a grid of codes.

        Args:
            token_ids_BGG: int64 `[B, G, G]`.

        Returns:
            `[B, 3, T, T]` in [0, 1], in the dtype of the weights.

        Raises:
            RuntimeError: the tokenizer was loaded from an encoder alone.
        """
        if self.decoder is None:
            raise RuntimeError("this tokenizer has no decoder: it was loaded from an encoder alone")
        return mean_pixels(self.decoder.from_embedded(self.decoder.embed(token_ids_BGG)))


def mean_pixels(output: Tensor) -> Tensor:
    """The decoder's first three channels are logits of mapped pixels; the rest, if any, their log-scale."""
    return unmap_pixels(torch.sigmoid(output[:, :3]))


def init_conv(module: nn.Module) -> None:
    """Weights of unit gain, biases 0, as DALL-E's."""
    if isinstance(module, nn.Conv2d):
        fan_in = module.weight[0].numel()
        nn.init.normal_(module.weight, std=fan_in**-0.5)
        assert module.bias is not None
        nn.init.zeros_(module.bias)
