"""The search for the best code: ours and what people would use instead."""

from .nearest_code import OPERATORS  # noqa: F401  the fixtures find it


def test_nearest_code(time_operator):
    time_operator()
