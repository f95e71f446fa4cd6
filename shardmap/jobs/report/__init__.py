"""Reports.

Pieces that a run's own report is made of, and `shardmap.jobs.report.page`, which makes a page of a
run folder.
"""

from shardmap.jobs.report.pieces import (
    Tile,
    contact_sheet,
    format_table,
    write_csv,
)
from shardmap.run.palette import FAINT, INK, RIGHT, WRONG

__all__ = ["FAINT", "INK", "RIGHT", "WRONG", "Tile", "contact_sheet", "format_table", "write_csv"]
