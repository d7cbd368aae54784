"""Reports in a real browser: they open, load nothing, run nothing, and are readable in every layout."""

from __future__ import annotations

import base64
import itertools
from pathlib import Path

import pytest

from mthp.addrspace import AddressSpace
from mthp.engine.select import PlanOptions
from mthp.report import write
from mthp.report.document import Command
from mthp.report.gather import Source, report_on
from report_spaces import HOSTILE, HugeSpace, hostile, redis_like
from web.conftest import DESKTOP, PHONE, Browser

pytest.importorskip("jinja2")


def page_of(space: AddressSpace, path: Path, *, max_ptes_none: int = 64) -> Path:
    commands = [Command("This page", "mthp report 4711.parquet -o report.html"), Command("Odd", HOSTILE[1])]
    source = Source(space, "2026-01-02T03:04:05+00:00", arguments=HOSTILE[0])
    write(report_on(source, PlanOptions(max_ptes_none=max_ptes_none), commands), path, overwrite=True)
    return path


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return page_of(redis_like(), tmp_path_factory.mktemp("report") / "report.html")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_it_opens_without_complaint_and_loads_nothing(browser: Browser, report: Path, width: int, scheme: str) -> None:
    browser.open(report, width=width, scheme=scheme)
    browser.screenshot(f"report-{'phone' if width == PHONE else 'desktop'}-{scheme}")
    assert browser.complaints() == []
    assert browser.requests() in ([report.as_uri()], [report.as_uri(), "data:,"])
    assert browser.ask("document.scripts.length") == 0
    assert browser.ask("document.querySelectorAll('.map path').length") > 10
    assert browser.ask("document.documentElement.scrollWidth") <= width, "the page is wider than the screen"


def test_hostile_names_are_shown_and_not_run(browser: Browser, tmp_path: Path) -> None:
    path = page_of(hostile(), tmp_path / "hostile.html")
    browser.open(path)
    assert browser.ask("window.pwned === undefined")
    assert browser.complaints() == []
    assert browser.requests() in ([path.as_uri()], [path.as_uri(), "data:,"])
    assert browser.ask("document.querySelectorAll('img, script, iframe, object, a[href]').length") == 0
    shown = browser.ask("document.body.textContent")
    for name in HOSTILE[:5]:
        assert name in shown
    assert "\x1b" not in shown
    assert "\u202e" not in shown


def test_the_browser_is_told_to_run_nothing(browser: Browser, report: Path) -> None:
    browser.open(report)
    browser.driver.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.pwned = 5'; document.body.append(s);"
        "const i = new Image(); i.src = 'https://example.org/x.png'; document.body.append(i);"
    )
    assert browser.ask("window.pwned === undefined")
    assert any("Content Security Policy" in complaint for complaint in browser.complaints())


_CONTRAST = """(() => {
  const part = text => text.match(/[0-9.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const ground = e => { for (; e; e = e.parentElement) { const c = part(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
  const found = {};
  for (const e of document.querySelectorAll('body *')) {
    if (![...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim())) continue;
    const style = getComputedStyle(e), svg = e.ownerSVGElement;
    if (svg && e.tagName != 'text') continue;
    const a = light(part(svg ? style.fill : style.color)), b = light(ground(svg ? svg.parentElement : e));
    found[e.tagName + '.' + (e.className.baseVal ?? e.className)] = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  }
  return found;
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_by_who_sees_little_contrast(browser: Browser, report: Path, scheme: str) -> None:
    browser.open(report, scheme=scheme)
    contrast = browser.ask(_CONTRAST)
    assert len(contrast) > 10
    # Web Content Accessibility Guidelines 2.2, 1.4.3.
    assert {name: ratio for name, ratio in contrast.items() if ratio < 4.5} == {}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_larger_folios_are_told_apart_by_lightness_alone(browser: Browser, report: Path, scheme: str) -> None:
    browser.open(report, scheme=scheme)
    lightness = browser.ask(
        """[1,2,3,4,5,6,7,8,9].map(n => { const e = document.createElementNS('http://www.w3.org/2000/svg', 'rect');
        e.setAttribute('class', 'k-o' + n); document.querySelector('.map').append(e);
        const [r, g, b] = getComputedStyle(e).fill.match(/[0-9.]+/g).map(Number);
        return .2126 * r + .7152 * g + .0722 * b; })"""
    )
    steps = [after - before for before, after in itertools.pairwise(lightness)]
    assert all(step > 2 for step in steps) or all(step < -2 for step in steps), lightness


def test_pictures_are_told_in_words_and_tables_have_heads(browser: Browser, report: Path) -> None:
    browser.open(report)
    silent = browser.ask(
        "[...document.querySelectorAll('svg')].filter(e => e.getAttribute('aria-hidden') != 'true'"
        " && !(e.getAttribute('role') == 'img' && e.getAttribute('aria-label').length > 5)).length"
    )
    assert silent == 0
    assert browser.ask("[...document.querySelectorAll('th')].every(e => e.scope)")
    assert browser.ask("document.documentElement.lang") == "en"
    headings = browser.ask("[...document.querySelectorAll('h1,h2,h3,h4')].map(e => Number(e.tagName[1]))")
    assert headings[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(headings))


def test_it_prints(browser: Browser, report: Path) -> None:
    browser.open(report, scheme="dark", media="print")
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    shown = "[...document.querySelectorAll('details td')].every(e => e.checkVisibility({contentVisibilityAuto: true}))"
    assert browser.ask(shown), "what is folded on a screen is open on paper"
    printed = base64.b64decode(browser.tell("Page.printToPDF", printBackground=False)["data"])
    (browser.screenshots / "report.pdf").write_bytes(printed)
    assert printed.startswith(b"%PDF")
    assert 2 <= printed.count(b"/Type /Page\n") + printed.count(b"/Type /Page ") <= 12


def test_an_empty_process_is_told_in_words(browser: Browser, tmp_path: Path) -> None:
    from fakes import FakeSpace

    path = page_of(FakeSpace([], label="2 (empty)"), tmp_path / "empty.html")
    browser.open(path)
    assert browser.complaints() == []
    assert "nothing to collapse" in browser.ask("document.querySelector('.verdict').textContent")
    assert browser.ask("document.querySelectorAll('.map, .plot').length") == 0


def test_a_large_process_makes_no_large_page(browser: Browser, tmp_path: Path) -> None:
    path = page_of(HugeSpace(4 << 30), tmp_path / "huge.html")
    assert path.stat().st_size < 10 << 20
    browser.open(path, width=DESKTOP)
    assert browser.complaints() == []
    assert browser.ask("document.querySelectorAll('.map').length") == 2
