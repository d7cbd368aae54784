"""What an explanation says of a whole process. Causes are staged on real processes in tests/live."""

from __future__ import annotations

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
