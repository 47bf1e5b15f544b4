"""Work and size of a tokenizer's encoder, counted from its sizes.

T side of the token view, W channels of the first group, G groups of K blocks, V codes.
"""

from collections.abc import Iterator
from typing import NamedTuple

from ..config import TokenizerSettings


class TokenizerSize(NamedTuple):
    """What an encoder's work depends on; DALL-E's is 8192, 256, 4, 2."""

    vocab_size: int
    width: int
    groups: int
    blocks_per_group: int

    @property
    def stride(self) -> int:
        """Pixels that a token covers along one side."""
        return 2 ** (self.groups - 1)


DALLE = TokenizerSize(8192, 256, 4, 2)


def size_of(settings: TokenizerSettings) -> TokenizerSize:
    """Sizes of the tokenizer that is trained where none is given."""
    return TokenizerSize(settings.vocab_size, settings.width, settings.groups, settings.blocks_per_group)


def _convolutions(size: TokenizerSize) -> Iterator[tuple[int, int, int, int]]:
    """Each convolution but the last as (channels in, channels out, side of the kernel, halvings of the picture)."""
    yield 3, size.width, 7, 0
    channels = size.width
    for group in range(size.groups):
        out = size.width * 2**group
        for _ in range(size.blocks_per_group):
            if channels != out:
                yield channels, out, 1, group
            hidden = out // 4
            yield from ((channels, hidden, 3, group), (hidden, hidden, 3, group), (hidden, hidden, 3, group))
            yield hidden, out, 1, group
            channels = out


def encoder_parameters(size: TokenizerSize) -> int:
    """Weights and biases of the encoder."""
    last = size.width * 2 ** (size.groups - 1)
    inner = sum(before * after * side**2 + after for before, after, side, _ in _convolutions(size))
    return inner + (last + 1) * size.vocab_size


def encoding_flops(size: TokenizerSize, token_side: int) -> tuple[float, float]:
    """Floating point operations of one picture's tokens: of the convolutions, and of the product with the codes.

    A multiply-add counts 2. They are apart because, in fp32, convolutions are made in tf32 where a GPU has it, and the
    product with the codes is not.
    """
    inner = sum(
        2 * before * after * side**2 * (token_side // 2**halvings) ** 2
        for before, after, side, halvings in _convolutions(size)
    )
    last = size.width * 2 ** (size.groups - 1)
    return float(inner), float(2 * last * size.vocab_size * (token_side // size.stride) ** 2)


def encoding_memory(size: TokenizerSize, token_side: int, num_pictures: int, *, bf16: bool) -> float:
    """Bytes that making tokens needs at a time, weights excepted; `bf16`: under autocast.

    The first group works on the whole picture. At the end of a block it holds what the block got, its branch, the
    branch times its gain, and their sum, and of a later block what the group got: 4 or 5 times W T^2 numbers a
    picture. Beside them stands the view in fp32, 12 T^2. A convolution's own workspace is not counted.
    """
    tensors = 4 if size.blocks_per_group == 1 else 5
    return num_pictures * token_side**2 * ((2.0 if bf16 else 4.0) * tensors * size.width + 12.0)
