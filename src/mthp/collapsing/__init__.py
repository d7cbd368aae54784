"""What `mthp collapse` does: carry out the plan of an address space, within a budget, and say what came of it.

What came of a run is what :meth:`~mthp.addrspace.AddressSpace.collapse_blocks` says, since that is what the page tables
show. Every batch is read before, too: that tells what filling a run would cost at this moment, so that a bloat budget
stops before it is overspent, and leaves out what went away since the plan was made.

Two parts follow one another, each with the fullest runs first, so that a budget buys as much as it can:

- :mod:`~mthp.collapsing.ranges`: folios of the PMD order, by the kernel's call, one PMD range each: a call over many
  stops at the first that cannot be collapsed.
- :mod:`~mthp.collapsing.blocks`: folios below it, by moving pages, order by order, the largest first, many at a time;
  or :mod:`~mthp.collapsing.kernel`, by the kernel's own khugepaged.

What it may add and must leave free is in :mod:`mthp.budget`.

What ends a run early (Ctrl-C, a target that exits, a right that turns out to be missing) leaves a report of what was
done until then.
"""

from mthp.collapsing.allowed import Allowed, allowed_of
from mthp.collapsing.look import plan_blocks
from mthp.collapsing.options import CollapseOptions
from mthp.collapsing.report import CollapseReport, FolioTally
from mthp.collapsing.run import carry_out, collapse_space
from mthp.collapsing.work import Progress

__all__ = [
    "Allowed",
    "CollapseOptions",
    "CollapseReport",
    "FolioTally",
    "Progress",
    "allowed_of",
    "carry_out",
    "collapse_space",
    "plan_blocks",
]
