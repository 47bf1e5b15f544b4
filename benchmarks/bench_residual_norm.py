"""The end of a branch with the LayerNorm that follows it: ours and what people would use instead, in each direction."""

from .residual_norm import OPERATORS  # noqa: F401  the fixtures find it


def test_residual_norm(time_operator):
    time_operator()
