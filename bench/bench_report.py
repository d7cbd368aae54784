"""Measure how long the report of a 64 GiB process takes to open in Chromium, against an empty page, and its size.

The aims are 2 seconds and 10 MiB. The process is synthetic: one mapping in which each PMD range differs from the next.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from selenium import webdriver

from mthp.engine.select import PlanOptions
from mthp.report import write
from mthp.report.gather import Source, report_on
from peers import paired, show
from report_spaces import HugeSpace

SIZE = 64 << 30
AIM_SECONDS, AIM_BYTES = 2.0, 10 << 20


def main() -> None:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or sys.exit("needs chromium and chromedriver")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    with tempfile.TemporaryDirectory() as directory:
        page, empty = Path(directory) / "report.html", Path(directory) / "empty.html"
        empty.write_text("<!doctype html><title>empty</title>")
        began = time.perf_counter()
        size = write(report_on(Source(HugeSpace(SIZE), "made up"), PlanOptions(max_ptes_none=64), []), page)
        made = time.perf_counter() - began
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        try:

            def opened(path: Path) -> None:
                browser.get(path.as_uri())
                # A picture cannot be taken before the page is laid out and painted.
                browser.get_screenshot_as_png()

            pair = paired(lambda: opened(page), lambda: opened(empty))
        finally:
            browser.quit()
    show(f"open a report of 64 GiB / an empty page (aim {AIM_SECONDS:g} s)", pair, AIM_SECONDS / pair.peer)
    print(f"report of 64 GiB: {size / AIM_BYTES:.3f} of the {AIM_BYTES >> 20} MiB aimed at; made in {made:.1f} s")


if __name__ == "__main__":
    main()
