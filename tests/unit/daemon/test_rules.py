"""Rules: which processes fit, which of several wins."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mthp.daemon.rules import Rule, RuleSet, Settings
from mthp.naming import Match, ProcessFacts

REDIS = ProcessFacts(
    77, 1, uid=1000, comm="redis-server", exe="/usr/bin/redis-server", cgroup="/system.slice/redis.service/sub"
)


@pytest.mark.parametrize(
    ("match", "fits"),
    [
        (Match(), True),
        (Match(pid=(77,)), True),
        (Match(pid=(78, 79)), False),
        (Match(uid=(0, 1000)), True),
        (Match(comm=("redis*",)), True),
        (Match(comm=("redis",)), False),
        (Match(exe=("/usr/bin/*",)), True),
        (Match(cgroup=("/system.slice/redis.service",)), True),
        (Match(cgroup=("/system.slice",)), True),
        (Match(cgroup=("/",)), True),
        (Match(cgroup=("/system.slice/r",)), False),
        (Match(comm=("redis*",), uid=(0,)), False),
    ],
)
def test_all_that_a_rule_names_must_fit(match: Match, fits: bool) -> None:
    assert match.fits(REDIS) is fits


def test_the_most_specific_rule_wins_and_denial_before_all() -> None:
    by_uid = Rule("uid", Match(uid=(1000,)), settings=Settings(policy="rfc"))
    by_glob = Rule("glob", Match(comm=("redis*",)), settings=Settings(policy="rfc"))
    by_name = Rule("name", Match(comm=("redis-server",)), settings=Settings(policy="per-order"))
    by_exe = Rule("exe", Match(exe=("/usr/*",)), settings=Settings(policy="pmd-only"))
    rules = (by_uid, by_glob, by_name, by_exe)
    assert RuleSet(rules).rule_for(REDIS) is by_exe
    assert RuleSet(rules[:3]).rule_for(REDIS) is by_name
    assert RuleSet(rules[:2]).rule_for(REDIS) is by_glob
    deny = Rule("deny", Match(uid=(1000,)), deny=True)
    assert RuleSet((*rules, deny)).rule_for(REDIS) is deny
    assert RuleSet(rules).rule_for(ProcessFacts(1, 1, comm="bash")) is None


@given(
    pattern=st.text("ab*?", min_size=1, max_size=5),
    other=st.text("ab*?", min_size=1, max_size=5),
    name=st.text("ab", max_size=6),
)
def test_patterns_that_fit_the_same_name_are_never_taken_for_disjoint(pattern: str, other: str, name: str) -> None:
    facts = ProcessFacts(1, 1, comm=name)
    one, two = Match(comm=(pattern,)), Match(comm=(other,))
    if one.fits(facts) and two.fits(facts):
        assert one.may_share_a_process(two)
