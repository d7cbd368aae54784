"""Change the machine's THP switches in a live test, and put them back. Tests take the fixture ``thp_switches``."""

from __future__ import annotations

import contextlib
import json
import mmap
from collections.abc import Iterator
from pathlib import Path

from mthp.linux.journal.putback import settle
from mthp.linux.journal.store import JournalFiles, default_root

THP_ROOT = Path("/sys/kernel/mm/transparent_hugepage")


def size_name(order: int) -> str:
    """Return the size of folios of `order` as the kernel names its directory, such as ``"64kB"``."""
    return f"{mmap.PAGESIZE << order >> 10}kB"


def words_per_size() -> dict[str, str]:
    """Return the text of the switch of each size, by its path."""
    return {str(path): path.read_text() for path in sorted(THP_ROOT.glob("hugepages-*kB/enabled"))}


@contextlib.contextmanager
def windows_kept_out(patience: float) -> Iterator[None]:
    """Exclude windows of other processes; put back changes of a crashed process first."""
    files = JournalFiles(default_root(), create=True)
    try:
        files.lock(patience)
        settle(files, THP_ROOT)
        yield
    finally:
        files.close()


class ThpSwitches:
    """The machine's THP switches, and their former values.

    Args:
        state: file that the original words are kept in while they are changed.
    """

    def __init__(self, state: Path) -> None:
        self._state = state
        self._original: dict[str, str] = {}

    def set(self, path: str, word: str) -> None:
        """Choose `word` in the file `path` below the THP directory, such as ``"hugepages-64kB/enabled"``."""
        file = THP_ROOT / path
        text = file.read_text()
        now = text[text.index("[") + 1 : text.index("]")] if "[" in text else text.strip()
        if path not in self._original:
            self._original[path] = now
            self._state.write_text(json.dumps(self._original))
        if now != word:
            file.write_text(word)

    def only(self, *sizes: str, word: str = "madvise") -> None:
        """Enable the sizes given, such as ``"64kB"``, for memory with MADV_HUGEPAGE, and no other."""
        for directory in THP_ROOT.glob("hugepages-*kB"):
            if (directory / "enabled").exists():
                size = directory.name.removeprefix("hugepages-")
                self.set(f"{directory.name}/enabled", word if size in sizes else "never")

    def default(self) -> None:
        """Set what tests depend on, whatever the machine is tuned to.

        It is what a kernel begins with: folios of the PMD size for memory with MADV_HUGEPAGE, no others. But faults
        make room for a large folio where there is none, as free memory may well be in pieces.
        """
        for path, word in _defaults():
            if (THP_ROOT / path).exists():
                self.set(path, word)
        self.only(f"{_pmd_size() >> 10}kB", word="inherit")

    def recover(self) -> None:
        """Put back the changes of a session that was killed."""
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


def _pmd_size() -> int:
    return int((THP_ROOT / "hpage_pmd_size").read_text())


def _defaults() -> Iterator[tuple[str, str]]:
    ptes = _pmd_size() // mmap.PAGESIZE
    yield "enabled", "madvise"
    yield "defrag", "always"
    yield "shmem_enabled", "never"
    yield "use_zero_page", "1"
    yield "khugepaged/defrag", "1"
    yield "khugepaged/max_ptes_none", str(ptes - 1)
    yield "khugepaged/max_ptes_swap", str(ptes // 8)
    yield "khugepaged/max_ptes_shared", str(ptes // 2)
