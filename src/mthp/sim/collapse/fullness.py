"""Which runs of some PMD ranges a policy finds full enough, order by order, asked when the walk gets there."""

from __future__ import annotations

from mthp.engine.occupancy import Bits, Occupancy
from mthp.engine.policy import Policy, Rules


class Fullness:
    """Answers of one policy about some PMD ranges; each order is asked about once, for all of them."""

    def __init__(self, occupancy: Occupancy, policy: Policy, rules: Rules) -> None:
        self._occupancy = occupancy
        self._policy = policy
        self._rules = rules
        self._answers: dict[int, Bits | None] = {}

    def of(self, order: int) -> Bits | None:
        """Bool, shape (ranges, runs per range): which runs of `order` are full enough; None for all."""
        if order not in self._answers:
            self._answers[order] = self._policy.full_enough(self._occupancy.runs(order), self._rules)
        return self._answers[order]

    def enough(self, order: int, row: int, index: int) -> bool:
        """Whether run `index` of `order` in the range of row `row` is full enough."""
        answer = self.of(order)
        # A policy may give one row for all ranges, where they do not differ.
        return answer is None or bool(answer[row if len(answer) > 1 else 0, index])
