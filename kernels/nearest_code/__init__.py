"""The index of the best code for each row."""

from .op import NearestCode, nearest_code

__all__ = ["NearestCode", "nearest_code"]
