"""The colours of pictures and pages."""

INK = "#1f2430"
"""Text and axes."""
FAINT = "#8a90a0"
"""Notes and ticks."""
WRONG = "#c8321f"
RIGHT = "#2a6fb0"
