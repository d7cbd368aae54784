"""Policies of one's own: passed as an instance, and by name through an entry point of an installed package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

import mthp
from fakes import FakeSpace, page_runs
from mthp.cli import plan_command
from mthp.daemon import config
from mthp.engine.collapse import collapse_space
from mthp.engine.planning import plan_space
from mthp.engine.policy import BUILT_IN, OWN
from mthp.engine.policy_lookup import ENTRY_POINT_GROUP, policy_named, policy_names
from mthp.engine.select import PlanOptions
from mthp.errors import UsageError
from mthp.means import Means
from mthp.ptes import ORDER_NONE, Pte
from mthp.vma import Vma

BASE = 1 << 40


class ThreeQuarters(mthp.Policy):
    """Collapse a run when three quarters of it are there.

    And more.
    """

    name = "three-quarters"

    def limits(self, order: int, rules: mthp.Rules) -> mthp.Limits:
        return mthp.Limits(none=(1 << order) // 4, swap=0, shared=0)


# One PMD range: 400 pages (more than three quarters), then holes; and one of 16 pages of which 12 are present.
WIDE = np.arange(512) < 400
NARROW = np.isin(np.arange(512), np.arange(32, 44))


def test_an_instance_plans_ranges() -> None:
    plan = mthp.plan_ranges(np.array([WIDE, NARROW]), policy=ThreeQuarters())
    assert plan.policy == "three-quarters"
    assert set(plan.orders[0]) == {9}
    # Pages 32 to 47 are three quarters full. The other runs are empty.
    assert plan.orders[1].tolist() == [4 if 32 <= page < 48 else -1 for page in range(512)]
    assert plan.filled.tolist() == [112, 4]


def test_an_instance_plans_and_collapses_an_address_space() -> None:
    columns = page_runs((400, Pte.PRESENT, 0), (112, 0, ORDER_NONE))
    space = FakeSpace([(Vma(BASE, BASE + (2 << 20), "rw-p"), *columns)])
    options = PlanOptions(policy=ThreeQuarters())
    assert plan_space(space, options).folios_by_order == {9: 1}
    report = collapse_space(space, options, Means(max_bloat=None))
    assert report.plan.policy == "three-quarters"
    assert (report.ranges.made, report.filled_bytes) == (1, 112 * 4096)


def test_a_policy_must_say_its_limits() -> None:
    class Vague(mthp.Policy):
        name = "vague"

    with pytest.raises(TypeError, match="limits"):
        Vague()  # type: ignore[abstract]


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(UsageError, match="unknown policy 'bold'") as caught:
        policy_named("bold")
    for name in ("pmd-only", "rfc", "per-order", "mainline"):
        assert name in caught.value.help
        assert policy_named(name).name == name


PLUGIN = '''
import mthp


class ThreeQuarters(mthp.Policy):
    """Collapse a run when three quarters of it are there."""

    name = "three-quarters"

    def limits(self, order, rules):
        return mthp.Limits(none=(1 << order) // 4, swap=0, shared=0)


class Limitless(mthp.Policy):
    name = "limitless"


class Nameless(ThreeQuarters):
    name = None


class Stranger:
    pass


def made():
    return ThreeQuarters()
'''

ENTRY_POINTS = """
[mthp.policies]
three-quarters = throwaway_policies:ThreeQuarters
from-a-function = throwaway_policies:made
no-module = throwaway_nowhere:Policy
no-attribute = throwaway_policies:Missing
no-class = throwaway_policies:__doc__
bad-syntax = throwaway_syntax:Policy
bad-import = throwaway_import:Policy
bad-name = throwaway_name:Policy
stranger = throwaway_policies:Stranger
limitless = throwaway_policies:Limitless
nameless = throwaway_policies:Nameless
malformed = throw away!
mainline = throwaway_policies:Stranger
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A directory with an installed distribution that declares policies."""
    (tmp_path / "throwaway_policies.py").write_text(PLUGIN)
    (tmp_path / "throwaway_syntax.py").write_text("def :\n")
    (tmp_path / "throwaway_import.py").write_text("import throwaway_nowhere\n")
    (tmp_path / "throwaway_name.py").write_text("Policy = Undefined\n")
    information = tmp_path / "throwaway-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: throwaway\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(ENTRY_POINTS)
    return tmp_path


@pytest.fixture
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot of one PMD range with 400 pages."""
    pytest.importorskip("pyarrow")
    from mthp.snapshot import record

    columns = page_runs((400, Pte.PRESENT, 0), (112, 0, ORDER_NONE))
    path = tmp_path_factory.mktemp("snapshot") / "one.parquet"
    record(FakeSpace([(Vma(BASE, BASE + (2 << 20), "rw-p"), *columns)]), path)
    return path


def plan_with(site: Path, snapshot: Path, policy: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mthp", "plan", str(snapshot), "--policy", policy, "--json"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", ["three-quarters", "from-a-function"])
def test_a_declared_policy_is_used_by_name(site: Path, snapshot: Path, name: str) -> None:
    done = plan_with(site, snapshot, name)
    assert (done.returncode, done.stderr) == (0, "")
    plan: dict[str, Any] = json.loads(done.stdout)
    assert plan["policy"] == "three-quarters"
    assert plan["folios_by_order"] == {"9": 1}
    assert plan["bloat_bytes"] == 112 * 4096


def test_a_declared_policy_does_not_replace_one_of_the_four(site: Path, snapshot: Path) -> None:
    done = plan_with(site, snapshot, "mainline")
    assert json.loads(done.stdout)["policy"] == "mainline"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no-module", "No module named 'throwaway_nowhere'"),
        ("no-attribute", "Missing"),
        ("no-class", "not callable"),
        ("bad-syntax", "invalid syntax"),
        ("bad-import", "No module named 'throwaway_nowhere'"),
        ("bad-name", "Undefined"),
        ("stranger", "is a Stranger, not an mthp.Policy"),
        ("limitless", "limits"),
        ("nameless", "has no attribute `name`"),
        ("malformed", "cannot be loaded"),
    ],
)
def test_a_broken_policy_is_told_as_such(site: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str) -> None:
    monkeypatch.syspath_prepend(site)
    with pytest.raises(UsageError) as caught:
        policy_named(name)
    assert repr(name) in caught.value.message
    assert said in caught.value.message
    assert "throwaway" in caught.value.help
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["no-module", "stranger"])
def test_a_broken_policy_is_wrong_usage_on_the_command_line(site: Path, snapshot: Path, name: str) -> None:
    done = plan_with(site, snapshot, name)
    assert done.returncode == 2
    assert f"policy '{name}'" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)["error"]["exit_code"] == 2


def test_the_help_and_the_example_of_rules_list_ours() -> None:
    ours = ", ".join([*BUILT_IN, *OWN])
    (option,) = (each for each in plan_command.command.params if each.name == "policy")
    assert isinstance(option, click.Option)
    assert ours in (option.help or "")
    assert ours in config.example()


def test_declared_policies_are_listed_behind_ours(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(site)
    names = policy_names()
    assert names[:6] == ["pmd-only", "rfc", "rfc2", "per-order", "mainline", "no-creep"]
    assert {"three-quarters", "stranger"} <= set(names[6:])
    assert names[6:] == sorted(names[6:])
    assert len(names) == len(set(names))
    assert ENTRY_POINT_GROUP == "mthp.policies"
