"""What makes folios in a comparison or a simulation, by name: a policy, and ``:split`` behind it where mthp does it.

Without the suffix the kernel's khugepaged makes them, one by one; with it, mthp collapses a PMD range and splits its
folio.
"""

from __future__ import annotations

from dataclasses import dataclass

from mthp.engine.policy import Policy
from mthp.engine.policy_lookup import policy_named
from mthp.toml import text

SPLIT = ":split"
"""What stands behind the name of a policy that mthp carries out by splitting."""


@dataclass(frozen=True, slots=True)
class Maker:
    """What makes folios.

    Attributes:
        policy: which.
        splits: whether mthp makes them, by splitting.
    """

    policy: Policy
    splits: bool = False

    @property
    def name(self) -> str:
        """What results call it."""
        return self.policy.name + (SPLIT if self.splits else "")

    @classmethod
    def named(cls, name: str | Policy) -> Maker:
        """Return the maker of that name.

        Raises:
            UsageError: there is no such policy.
        """
        if isinstance(name, Policy):
            return cls(name)
        return cls(policy_named(name.removesuffix(SPLIT)), name.endswith(SPLIT))


def known_maker(name: object) -> str:
    """Return the name of a maker, if there is one of that name.

    Raises:
        UsageError: not a text, or as :meth:`Maker.named`.
    """
    return Maker.named(text(name)).name
