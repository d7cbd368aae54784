"""The collapse of all orders at once by the kernel's own khugepaged: in windows, as long as they bring something.

khugepaged goes by its own order, so nothing is left out for a budget, and what is counted is what the page tables
show after each window.
"""

from __future__ import annotations

from collections.abc import Callable

from mthp.addrspace import AddressSpace, Block, CollapseOutcome
from mthp.collapsing.look import look_at_blocks
from mthp.collapsing.options import CollapseOptions
from mthp.collapsing.report import CollapseReport, FolioTally
from mthp.collapsing.work import Progress, Work
from mthp.space_plan import SpacePlan


def by_khugepaged(
    space: AddressSpace,
    plan: SpacePlan,
    options: CollapseOptions,
    progress: Progress | None,
    stop: Callable[[], bool],
    before: Callable[[SpacePlan], None],
) -> CollapseReport:
    """Carry out `plan` by the mechanism ``khugepaged``; arguments and errors as of `mthp.collapsing.carry_out`."""
    report = CollapseReport(plan, dry_run=options.dry_run)
    report.folios = {order: FolioTally(planned=n, not_tried=n) for order, n in plan.folios_by_order.items() if n}
    if options.dry_run or not len(plan.folios):
        return report
    blocks = list(zip(plan.folios.address.tolist(), plan.folios.order.tolist(), strict=True))
    size = space.geometry.size_of
    work = Work(space, options, report, sum(size(order) for _, order in blocks), progress, stop)
    before(plan)
    with work.reported():
        _in_windows(work, blocks)
    return report


def _in_windows(work: Work, blocks: list[Block]) -> None:
    """Let khugepaged at `blocks` until a window brings nothing new."""
    contents = _contents(work, blocks)
    outcomes: list[CollapseOutcome] = []
    while blocks and not work.told_to_stop():
        outcomes = work.space.collapse_blocks(blocks, work.options.means)
        work.began()
        left = _account(work, blocks, contents)
        if len(left) == len(blocks):
            break
        blocks = left
    for (_, order), outcome in zip(blocks, outcomes, strict=False):
        if not work.report.interrupted:
            tally = work.report.folios[order]
            tally.not_tried -= 1
            tally.failed[outcome.result, outcome.reason or outcome.result.meaning] += 1


def _contents(work: Work, blocks: list[Block]) -> dict[Block, int]:
    """Pages that each of `blocks` holds, where it is not in a folio of its order already; those count as unchanged."""
    found = {}
    for order, addresses in _by_order(blocks).items():
        look = look_at_blocks(work.space, addresses, order)
        for address, large, contents in zip(addresses, look.large.tolist(), look.contents.tolist(), strict=True):
            found[address, order] = -1 if large else int(contents)
    return found


def _account(work: Work, blocks: list[Block], contents: dict[Block, int]) -> list[Block]:
    """Look at `blocks` after a window, and count what is made: the others."""
    left = []
    geometry, report = work.space.geometry, work.report
    for order, addresses in _by_order(blocks).items():
        tally = report.folios[order]
        look = look_at_blocks(work.space, addresses, order)
        for address, made in zip(addresses, look.large.tolist(), strict=True):
            held = contents[address, order]
            if not made:
                left.append((address, order))
                continue
            tally.not_tried -= 1
            work.step(geometry.size_of(order), geometry.label(order))
            if held < 0:
                tally.unchanged += 1
            else:
                tally.made += 1
                report.copied_bytes += held * geometry.page_size
                report.filled_bytes += ((1 << order) - held) * geometry.page_size
    return left


def _by_order(blocks: list[Block]) -> dict[int, list[int]]:
    """The addresses of `blocks` by their order."""
    found: dict[int, list[int]] = {}
    for address, order in blocks:
        found.setdefault(order, []).append(address)
    return found
