"""Change the machine's THP switches in a live test, and put them back. Tests take the fixture ``thp_switches``."""

from __future__ import annotations

import json
from pathlib import Path

THP_ROOT = Path("/sys/kernel/mm/transparent_hugepage")


class ThpSwitches:
    """The machine's THP switches, and what they were.

    Args:
        state: file that the original words are kept in while they are changed.
    """

    def __init__(self, state: Path) -> None:
        self._state = state
        self._original: dict[str, str] = {}

    def set(self, path: str, word: str) -> None:
        """Choose `word` in the file `path` below the THP directory, such as ``"hugepages-64kB/enabled"``."""
        file = THP_ROOT / path
        if path not in self._original:
            text = file.read_text()
            self._original[path] = text[text.index("[") + 1 : text.index("]")] if "[" in text else text.strip()
            self._state.write_text(json.dumps(self._original))
        file.write_text(word)

    def only(self, *sizes: str, word: str = "madvise") -> None:
        """Enable the sizes given, such as ``"64kB"``, for memory with MADV_HUGEPAGE, and no other."""
        for directory in THP_ROOT.glob("hugepages-*kB"):
            if (directory / "enabled").exists():
                size = directory.name.removeprefix("hugepages-")
                self.set(f"{directory.name}/enabled", word if size in sizes else "never")

    def recover(self) -> None:
        """Put back what a session that did not end well left."""
        text = self._state.read_text()
        if text:
            self._original = json.loads(text)
            self.restore()

    def restore(self) -> None:
        """Put everything back."""
        for path, word in self._original.items():
            (THP_ROOT / path).write_text(word)
        self._original = {}
        self._state.write_text("")
