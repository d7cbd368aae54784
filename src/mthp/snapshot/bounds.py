"""Bounds on the size of files and results; :mod:`mthp.bounded` documents how to raise them."""

from __future__ import annotations

from mthp.bounded import Bound

PAGES = Bound(1 << 28, "pages of memory")
"""Of one address space: 1 TiB in pages of 4 KiB. One run may stand for all of them, but plans process each."""

RUNS = Bound(1 << 22, "runs of pages at a time")
"""Of a row group, or of one step of a recording and all before it: some 100 bytes of memory each while they are read.
A process of 16 GiB in which every page differs from its neighbours has this many."""

RUNS_IN_ALL = Bound(1 << 26, "runs of pages")
"""Of a snapshot. Its row groups are read one after another."""

BLOCKS = Bound(1 << 16, "blocks of a snapshot")
"""Each has 65 536 runs, except the last."""

MAPPINGS = Bound(1 << 18, "mappings")
"""vm.max_map_count is 65 530 by default."""

HEAT_SPANS = Bound(1 << 16, "spans of heat")
"""Of one recording: enough for 128 GiB of 2 MiB ranges in which neighbours differ as much as possible."""

STEPS = Bound(1 << 20, "steps of a recording")
"""Twelve days at one step a second."""

COUNTERS = Bound(1 << 10, "counters of a step")
"""A kernel has some 250."""

ACCESSES = Bound(1 << 24, "pages that are used in one step of a trace")
"""64 GiB in pages of 4 KiB, at 8 bytes of memory each."""

TRACED_PAGES = Bound(1 << 24, "different pages that a trace uses")
"""Each is processed again in every step."""

TEXT = Bound(1 << 16, "characters of one text")
"""A path has at most 4 096 bytes, each of which the kernel may escape as four."""

CELLS = Bound(1 << 24, "cells of a table")
"""Rows times columns of a result; a cell needs some 60 bytes."""

TEXT_BYTES = Bound(1 << 28, "bytes of text in a table")
