"""Models that exist already, with their attention done by this library."""

from .fusing import FuseReport, fuse, unfuse

__all__ = ["FuseReport", "fuse", "unfuse"]
