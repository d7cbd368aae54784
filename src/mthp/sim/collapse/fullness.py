"""Which runs of some PMD ranges are full enough for a policy, computed when the walk reaches their order."""

from __future__ import annotations

from mthp.engine.bits import Bits
from mthp.engine.occupancy import Occupancy
from mthp.engine.policy import Policy, Rules


class Fullness:
    """Answers of one policy about some PMD ranges; it is called once per order, for all of them."""

    def __init__(self, occupancy: Occupancy, policy: Policy, rules: Rules) -> None:
        self._occupancy = occupancy
        self._policy = policy
        self._rules = rules
        self._answers: dict[int, Bits | None] = {}

    def of(self, order: int) -> Bits | None:
        """Return which runs of `order` are full enough: bool, shape (ranges, runs per range); None for all."""
        # For all ranges at once, although the walk needs one range at a time: a column costs as much as an answer.
        if order not in self._answers:
            self._answers[order] = self._policy.full_enough(self._occupancy.runs(order), self._rules)
        return self._answers[order]

    def enough(self, order: int, row: int, index: int) -> bool:
        """Return whether run `index` of `order` in the range of row `row` is full enough."""
        answer = self.of(order)
        # A policy may return one row for all ranges if they do not differ.
        return answer is None or bool(answer[row if len(answer) > 1 else 0, index])
