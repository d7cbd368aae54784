"""Draw what ``mthp demo`` prints on this machine: ``python docs/picture.py docs/demo.svg``."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

COLUMNS = 100


def draw(text: str) -> str:
    """Return a picture of a terminal that shows a text. It loads nothing: its fonts are those of the reader."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(text), soft_wrap=True)
    template = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    # The generator names its home page; a picture of this project names none.
    template = re.sub(r"<!--.*?-->", "", template)
    return console.export_svg(title="mthp demo", theme=MONOKAI, code_format=template)


def main(path: Path) -> None:
    """Run the demo and write the picture."""
    environment = os.environ | {"COLUMNS": str(COLUMNS)}
    done = subprocess.run(
        [sys.executable, "-m", "mthp", "demo"], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    path.write_text(draw(done.stdout))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
