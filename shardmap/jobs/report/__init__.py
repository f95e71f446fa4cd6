"""Tables and pictures for a run's own report; `shardmap.jobs.report.page` makes the HTML page."""

from shardmap.jobs.report.pieces import Tile, contact_sheet, format_table, write_csv
from shardmap.run.colours import FAINT, INK, RIGHT, WRONG

__all__ = ["FAINT", "INK", "RIGHT", "WRONG", "Tile", "contact_sheet", "format_table", "write_csv"]
