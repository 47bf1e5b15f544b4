"""The picture report of a run: what it is about, and one file that shows it."""

from .content import PictureRow, Report
from .page import write_report
from .pictures import mask_picture, picture_sheet

__all__ = ["PictureRow", "Report", "mask_picture", "picture_sheet", "write_report"]
