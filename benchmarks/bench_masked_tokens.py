"""The four operators of masked pictures: ours and what people would use instead, in each direction."""

from .masked_tokens import OPERATORS  # noqa: F401  the fixtures find it


def test_masked_tokens(time_operator):
    time_operator()
