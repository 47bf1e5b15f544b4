"""The loss over visual tokens: ours, what people would use instead, and its products alone."""

from .token_loss import OPERATORS  # noqa: F401  the fixtures find it


def test_token_loss(time_operator):
    time_operator()
