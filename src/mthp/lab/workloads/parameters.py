"""The types of a scenario's values, each with its notation (:mod:`mthp.units`)."""

from __future__ import annotations

from typing import Annotated

from mthp.toml import positive, whole
from mthp.units import parse_duration, parse_factor, parse_share, parse_size


def _seconds(value: object) -> float:
    return parse_duration(value, bare="s") / 1e9


Size = Annotated[int, positive(parse_size)]
"""Bytes, written ``"400M"``."""

SizeOrNone = Annotated[int, parse_size]
"""Bytes, or 0 for none."""

Duration = Annotated[float, _seconds]
"""Seconds, written ``"500ms"``, ``"30s"``, ``"5m"``, or a number of seconds."""

Period = Annotated[float, positive(_seconds)]
"""A duration above 0."""

Share = Annotated[float, parse_share]
"""A part of 1, written ``"30%"`` or ``0.3``."""

Factor = Annotated[float, parse_factor]
"""A number of at least 0, written ``"200%"`` or ``2.0``."""

Speed = Annotated[float, positive(parse_factor)]
"""A factor above 0."""

Count = Annotated[int, whole()]
"""A whole number, at least 0."""

FilePath = Annotated[str, "file"]
"""A file, relative to the directory of the scenario."""
