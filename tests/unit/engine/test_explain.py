"""What an explanation says of a whole process. Causes are staged on real processes in tests/live."""

from __future__ import annotations

import pytest

from fakes import FakeSpace, page_runs
from mthp.engine.explain import explain_space
from mthp.engine.policy import BUILT_IN, OWN
from mthp.ptes import Pte
from mthp.vma import Vma

BASE = 1 << 40
WHOLE = Vma(BASE, BASE + (2 << 20), "rw-p", "[heap]")


def test_policies_of_the_same_effect_share_a_sentence() -> None:
    sentences = explain_space(FakeSpace([(WHOLE, *page_runs((512, Pte.PRESENT, 0)))])).sentences
    names = ", ".join((*BUILT_IN, *OWN))
    assert f"policies {names} would make folios: 1 of 2M; that would copy 2M and add 0 of bloat" in sentences


class Hindered(FakeSpace):
    """A space that the mover does not touch."""

    def objections(self, vma: Vma | None) -> list[str]:
        return ["it is the stack of the first thread"]

    def pins(self, vma: Vma | None) -> list[str]:
        return []


@pytest.mark.parametrize("address", [None, BASE])
def test_the_mover_is_no_remedy_for_memory_that_it_refuses(address: int | None) -> None:
    stack = Vma(BASE, BASE + 4096, "rw-p", "[stack]")
    mappings = [(stack, *page_runs((1, Pte.PRESENT, 0)))]
    (movable,) = (each for each in explain_space(FakeSpace(mappings), address).memory if "out of reach" in each)
    (refused,) = (each for each in explain_space(Hindered(mappings), address).memory if "out of reach" in each)
    assert "--mechanism move" in movable
    assert "--mechanism move" not in refused


def test_one_page_is_one_page() -> None:
    stack = Vma(BASE, BASE + 4096, "rw-p", "[stack]")
    told = explain_space(FakeSpace([(stack, *page_runs((1, Pte.PRESENT, 0)))]), BASE).memory
    assert told[0].startswith(f"{BASE:#x} lies in [stack], anonymous memory, 4K at {BASE:#x} (rw-p)")
    assert "has 1 page in this mapping" in told[1]
