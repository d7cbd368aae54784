"""A headless Chromium that opens pages. Without one these tests are skipped.

With ``MTHP_REQUIRE_BROWSER=1`` such a skip is a failure. Screenshots are written to the directory that
``MTHP_SCREENSHOTS`` names, or to the test's own.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

DESKTOP, PHONE = 1200, 390


def _absent(reason: str) -> NoReturn:
    if os.environ.get("MTHP_REQUIRE_BROWSER") == "1":
        pytest.fail(f"{reason}, and MTHP_REQUIRE_BROWSER=1 forbids to skip", pytrace=False)
    pytest.skip(reason)


@dataclass
class Browser:
    """Chromium, with what a test wants of it.

    Attributes:
        driver: of selenium.
        screenshots: where pictures go.
    """

    driver: Any
    screenshots: Path

    def open(self, path: Path, *, width: int = DESKTOP, scheme: str = "light", media: str = "screen") -> None:
        """Open a file as it looks on a screen of `width` under a colour scheme."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.tell("Emulation.setDeviceMetricsOverride", **metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.tell("Emulation.setEmulatedMedia", media=media, features=features)
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)
        self.driver.get(path.resolve().as_uri())

    def tell(self, method: str, **parameters: Any) -> Any:
        """Send a command of the Chrome DevTools protocol, and return its result."""
        return self.driver.execute_cdp_cmd(method, parameters)

    def ask(self, script: str) -> Any:
        """Return the value of an expression of JavaScript, which the tester runs and not the page."""
        return self.driver.execute_script(f"return ({script})")

    def complaints(self) -> list[str]:
        """What the console says since the page was opened."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Return the addresses that were requested since the page was opened."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]

    def screenshot(self, name: str) -> Path:
        """Write a picture of the whole page, and return its path."""
        shot = self.tell("Page.captureScreenshot", captureBeyondViewport=True)
        path = self.screenshots / f"{name}.png"
        path.write_bytes(base64.b64decode(shot["data"]))
        return path


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless Chromium for all tests of this session."""
    try:
        from selenium import webdriver
        from selenium.common.exceptions import WebDriverException
    except ImportError:
        _absent("needs selenium")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        _absent("needs chromium and chromedriver (Debian: apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    # Root has no sandbox of its own; containers often have a small /dev/shm.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chosen = os.environ.get("MTHP_SCREENSHOTS")
    screenshots = Path(chosen) if chosen else tmp_path_factory.mktemp("screenshots")
    screenshots.mkdir(parents=True, exist_ok=True)
    # Not in a directory of pytest's: a socket's name must be short.
    with tempfile.TemporaryDirectory(prefix="mthp-web-", ignore_cleanup_errors=True) as own:
        service = webdriver.ChromeService(driver, env=os.environ | {"TMPDIR": own})
        try:
            chrome = webdriver.Chrome(options=options, service=service)
        except WebDriverException:
            # Where everything has yet to be read from the disk, the driver may lose its patience.
            chrome = webdriver.Chrome(options=options, service=service)
        try:
            yield Browser(chrome, screenshots)
        finally:
            chrome.quit()
