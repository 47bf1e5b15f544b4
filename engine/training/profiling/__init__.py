"""One training step taken apart: marks around the model's parts, a table, a picture, a trace."""

from .measure import Profile, profile
from .page import write_page
from .table import figures, sentence, table

__all__ = ["Profile", "figures", "profile", "sentence", "table", "write_page"]
