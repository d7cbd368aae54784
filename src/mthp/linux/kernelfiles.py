"""Read a small file of /proc or /sys that this kernel may lack, or that these rights may not open."""

from __future__ import annotations

from pathlib import Path


def text_of(path: Path) -> str | None:
    """Return the text of a file without newlines at its end; None if it cannot be read."""
    try:
        return path.read_text(errors="replace").rstrip("\n")
    except OSError:
        return None
