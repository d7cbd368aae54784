"""A :class:`~mthp.report.document.Document` as HTML: one file, complete in itself."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import tempfile
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from mthp.errors import MthpError, UnsupportedError
from mthp.report.document import Document
from mthp.text import clean

POLICY = "default-src 'none'; style-src '{style}'; img-src data:; base-uri 'none'; form-action 'none'"
"""What a browser lets the page do (Content-Security-Policy): nothing but be styled, by this style alone."""


def render(document: Document) -> str:
    """The page.

    Raises:
        UnsupportedError: Jinja2 is not installed.
    """
    template, style = load_template()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = POLICY.format(style=f"sha256-{digest}")
    text: str = template.render(document=document, style=style, policy=policy)
    return text


def write(document: Document, path: Path, *, overwrite: bool = False) -> int:
    """Write the page to `path`, whole or not at all: the number of bytes.

    Raises:
        MthpError: the file exists, or cannot be written.
        UnsupportedError: Jinja2 is not installed.
    """
    # Names that are not UTF-8 hold surrogates, which no encoding has.
    data = render(document).encode("utf-8", "replace")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(data)
        try:
            # Made for its owner alone; a report is to have the rights of any new file.
            temporary.chmod(0o666 & ~_umask())
            if overwrite:
                temporary.replace(path)
            else:
                path.hardlink_to(temporary)
        finally:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
    except FileExistsError as error:
        raise MthpError(f"{path}: exists already", help="use --force to replace it") from error
    except OSError as error:
        raise MthpError(f"{path}: cannot be written: {error.strerror or error}") from error
    return len(data)


def _umask() -> int:
    value = os.umask(0o077)
    os.umask(value)
    return value


@cache
def load_template() -> tuple[Any, str]:
    """The template, and the style that goes into it; called beforehand, it says beforehand what is missing.

    Raises:
        UnsupportedError: Jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise UnsupportedError(
            f"reports need Jinja2, which cannot be imported: {error}", help="pip install 'mthp[report]'"
        ) from error
    files = resources.files("mthp.report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_fit
    )
    return environment.from_string((files / "page.html.jinja").read_text("utf-8")), (files / "page.css").read_text(
        "utf-8"
    )


def _fit(value: object) -> object:
    """What a template prints, without control characters; what is markup already stays as it is."""
    return clean(value) if type(value) is str else value
