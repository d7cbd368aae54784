"""The makers of folios in a comparison or a simulation, by name: a policy, with the suffix ``:split`` for mthp.

Without the suffix the kernel's khugepaged makes the folios, one by one. With it, mthp collapses a PMD range and splits
its folio.
"""

from __future__ import annotations

from dataclasses import dataclass

from mthp.engine.policy import Policy
from mthp.engine.policy_lookup import policy_named
from mthp.toml import text

SPLIT = ":split"
"""The suffix of a policy that mthp carries out by splitting."""


@dataclass(frozen=True, slots=True)
class Maker:
    """A maker of folios.

    Attributes:
        policy: its policy.
        splits: whether mthp makes them, by splitting.
    """

    policy: Policy
    splits: bool = False

    @property
    def name(self) -> str:
        """Its name in results."""
        return self.policy.name + (SPLIT if self.splits else "")

    @classmethod
    def named(cls, name: str | Policy) -> Maker:
        """Return the maker of that name.

        Raises:
            UsageError: no policy has that name.
        """
        if isinstance(name, Policy):
            return cls(name)
        return cls(policy_named(name.removesuffix(SPLIT)), name.endswith(SPLIT))


def known_maker(name: object) -> str:
    """Return the name of a maker, if a maker has that name.

    Raises:
        UsageError: `name` is not a text, or as :meth:`Maker.named`.
    """
    return Maker.named(text(name)).name
