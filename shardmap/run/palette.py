"""The colours of pictures, the same in all of them."""

from __future__ import annotations

INK = "#1f2430"
"""Text."""
FAINT = "#8a90a0"
"""Text of less weight, and axes."""
WRONG = "#c8321f"
"""What failed or is marked."""
RIGHT = "#2a6fb0"
"""What is as it should be."""
