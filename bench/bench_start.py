"""Measure how long ``mthp --help`` and ``import mthp`` take, against the interpreter alone.

The aims are absolute (200 ms and 150 ms); they are printed as ratios of the time of ``python -c pass`` in the same run.
"""

from __future__ import annotations

import subprocess
import sys

from peers import paired, show

AIMS = {"mthp --help": (["-m", "mthp", "--help"], 0.200), "import mthp": (["-c", "import mthp"], 0.150)}


def run(arguments: list[str]) -> None:
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    for name, (arguments, aim) in AIMS.items():
        pair = paired(lambda a=arguments: run(a), lambda: run(["-c", "pass"]))  # type: ignore[misc]
        show(f"{name} / python -c pass (aim {aim * 1e3:.0f} ms)", pair, aim / pair.peer)


if __name__ == "__main__":
    main()
