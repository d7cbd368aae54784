"""Text that is fit to be shown. Apart from the rest of the output because errors need it, and it costs nothing."""

from __future__ import annotations

import unicodedata


def clean(text: str) -> str:
    """`text` without control characters, for names that a process chose itself."""
    return "".join(char if unicodedata.category(char)[0] != "C" else "�" for char in text)
