"""A reason for which something is not moved."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why something is not moved.

    Attributes:
        key: a word for scripts, which stays.
        reason: what is the case, as a sentence without a full stop.
        remedy: what would make it possible, or ``""``.
    """

    key: str
    reason: str
    remedy: str = ""
