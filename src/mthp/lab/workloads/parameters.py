"""The types of what a scenario says, each with how it is written."""

from __future__ import annotations

from typing import Annotated

Size = Annotated[int, "size"]
"""Bytes, written ``"400M"``."""

Duration = Annotated[float, "duration"]
"""Seconds, written ``"500ms"``, ``"30s"``, ``"5m"``, or a number of seconds."""

Share = Annotated[float, "share"]
"""A part of 1, written ``"30%"`` or ``0.3``."""

Count = Annotated[int, "count"]
"""A whole number, at least 0."""

FilePath = Annotated[str, "file"]
"""A file, seen from the directory of the scenario."""
