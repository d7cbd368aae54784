"""A :class:`~mthp.report.document.Document` as HTML: one file, complete in itself."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from mthp.errors import UnsupportedError
from mthp.files import write_whole
from mthp.report.document import Document
from mthp.text import clean

POLICY = "default-src 'none'; style-src '{style}'; img-src data:; base-uri 'none'; form-action 'none'"
"""Content-Security-Policy: the browser lets the page use this one style, and nothing else."""


def html_of(document: Document, version: str = "") -> str:
    """Return the page, with the version of mthp at its foot.

    Raises:
        UnsupportedError: Jinja2 is not installed.
    """
    template, style = load_template()
    # A style in the page needs its hash in the policy.
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = POLICY.format(style=f"sha256-{digest}")
    text: str = template.render(document=document, version=version, style=style, policy=policy)
    return text


def write(document: Document, path: Path, *, overwrite: bool = False, version: str = "") -> int:
    """Write the page to `path`, whole or not at all, and return the number of bytes.

    Raises:
        MthpError: the file exists, or cannot be written.
        UnsupportedError: Jinja2 is not installed.
    """
    # Names that are not UTF-8 hold surrogates, which cannot be encoded.
    data = html_of(document, version).encode("utf-8", "replace")
    write_whole(path, data, overwrite=overwrite)
    return len(data)


@cache
def load_template() -> tuple[Any, str]:
    """Return the template and its style. Callers call it early, to fail before the work if Jinja2 is missing.

    Raises:
        UnsupportedError: Jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise UnsupportedError(
            f"reports need Jinja2, which cannot be imported: {error}",
            help="pip install jinja2, or apt install python3-jinja2",
        ) from error
    files = resources.files("mthp.report")
    # Names of processes, files and mappings can hold any characters, so all text is escaped. A field that is missing is
    # an error, and not an empty text.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_fit
    )
    return environment.from_string((files / "page.html.jinja").read_text("utf-8")), (files / "page.css").read_text(
        "utf-8"
    )


def _fit(value: object) -> object:
    """Return a printed value without control characters; markup stays as it is."""
    return clean(value) if type(value) is str else value
