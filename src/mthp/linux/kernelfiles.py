"""Read small files of /proc and /sys that this kernel may lack, or that these rights may not open."""

from __future__ import annotations

import re
from pathlib import Path

_ESCAPED = re.compile(r"\\([0-7]{3})")


def text_of(path: Path) -> str | None:
    """Return the text of a file without newlines at its end; None if it cannot be read."""
    try:
        return path.read_text(errors="replace").rstrip("\n")
    except OSError:
        return None


def unescaped(name: str) -> str:
    """Undo the kernel's escapes in a name (seq_file_path(), fs/seq_file.c): octal after a backslash."""
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), name) if "\\" in name else name
