"""The guest's end of the channel: the host has each line, even if the guest dies."""

from __future__ import annotations

import json
import os
from typing import Any


class Port:
    """The port ``$CHANNEL``, one JSON object a line. Without the variable, nothing is sent."""

    def __init__(self) -> None:
        place = os.environ.get("CHANNEL")
        self._file = open(place, "wb", buffering=0) if place else None  # noqa: SIM115 -- open until the end

    def tell(self, **what: Any) -> None:
        """Send an object to the host."""
        data = json.dumps(what).encode() + b"\n"
        while self._file and data:
            data = data[self._file.write(data) :]
