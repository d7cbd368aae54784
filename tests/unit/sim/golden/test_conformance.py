"""``mthp conformance replay`` and the reading of golden files: totals, exit codes, and files that are none."""

from __future__ import annotations

import copy
import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mthp.cli.conformance_command import command
from mthp.engine.policy_lookup import policy_in_file
from mthp.errors import UsageError
from mthp.sim.golden.cases import read_cases
from mthp.sim.golden.conformance import BEYOND_TABLE, WRITABLE, replay, replay_case
from mthp.sim.golden.differences import difference

CASE: dict[str, Any] = {
    "id": "one",
    "trigger": "khugepaged",
    "geometry": "ppc64-64k",
    "orders_enabled": [2],
    "max_ptes_none": 0,
    "max_ptes_swap": 4,
    "max_ptes_shared": 16,
    "before": [["anon", 7], ["none", 25]],
    "after": [[2, 4], [0, 3], ["none", 25]],
}
OTHER = CASE | {"id": "other", "after": [[0, 7], ["none", 25]]}


def written(path: Path, *cases: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(case) + "\n" for case in cases))
    return path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command, ["replay", *arguments])


def test_totals_come_last(tmp_path: Path) -> None:
    done = run(str(written(tmp_path / "good.jsonl", CASE, CASE)))
    assert done.exit_code == 0
    assert done.stdout.splitlines() == ["cases 2, match 2, mismatch 0"]


def test_a_mismatch_is_shown_and_exits_1(tmp_path: Path) -> None:
    good, bad = written(tmp_path / "good.jsonl", CASE), written(tmp_path / "bad.jsonl", OTHER)
    done = run(str(good), str(bad))
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    assert lines[0] == "case other"
    assert "pass 1: orders" in lines[1]
    assert lines[-1] == "cases 2, match 1, mismatch 1"


def test_json_is_one_object(tmp_path: Path) -> None:
    done = run("--json", str(written(tmp_path / "both.jsonl", CASE, OTHER)))
    assert done.exit_code == 1
    result = json.loads(done.stdout)
    assert result["schema"] == "mthp.conformance/1"
    assert (result["cases"], result["match"], result["mismatch"]) == (2, 1, 1)
    assert [case["case"] for case in result["mismatches"]] == ["other"]


MINE = """
import mthp

class Everything(mthp.Policy):
    name = "everything"

    def limits(self, order, rules):
        return mthp.Limits(1 << order, 0, 0)

class Broken(Everything):
    def limits(self, order, rules):
        return 1 // 0
"""


def test_a_policy_of_ones_own_in_a_file(tmp_path: Path) -> None:
    file, case = tmp_path / "mine.py", str(written(tmp_path / "case.jsonl", CASE))
    file.write_text(MINE)
    done = run("--policy", f"{file}:Everything", case)
    assert done.exit_code == 1
    assert "PTEs 4-6: base pages" in done.stdout
    assert run("--policy", "mainline", case).exit_code == 0
    failed = run("--policy", f"{file}:Broken", case)
    assert isinstance(failed.exception, UsageError)
    assert "'everything' failed at case one" in failed.exception.message
    assert failed.exception.help == f"see {file}, line 12"


@pytest.mark.parametrize(
    ("text", "name"),
    [("raise ValueError('so')", "Mine"), ("Mine = 7", "Mine"), (MINE, "Other"), ("import mthp", "Mine"),
     ("import mthp\nclass Mine(mthp.Policy): pass", "Mine"), ("class (", "Mine"), (None, "Mine")],
)  # fmt: skip
def test_a_file_without_the_policy_is_refused(tmp_path: Path, text: str | None, name: str) -> None:
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError) as refused:
        policy_in_file(f"{file}:{name}")
    assert "\n" not in refused.value.message
    assert (f"{file}:Everything" in (refused.value.help or "")) == (name == "Other")


def on_old_kernel(**others: object) -> dict[str, Any]:
    """Return a case of 6.12: everything was written before a fork, nothing since, and nothing is shared any more."""
    before = {"before": [["large:4", 16], ["none", 16]], "setup": "fork_child_keeps_only_shared"}
    limits = {"orders_enabled": [5], "max_ptes_none": 31}
    after = {"after": [[4, 16], ["none", 16]], "scan_result": "no_writable_page"}
    return CASE | before | limits | after | {"kernel": "6.12.117"} | others


def test_what_rests_on_a_pte_that_may_be_written_is_counted_apart(tmp_path: Path) -> None:
    report = replay_case(on_old_kernel())
    assert (report.mismatches, report.apart) == ((), WRITABLE)
    # If it was written since, the kernel collapses it without such a PTE.
    collapsed = on_old_kernel(after=[[5, 32]], scan_result="succeeded")
    assert replay_case(collapsed).apart == ""
    assert replay_case(collapsed).mismatches == ()
    # In a process that never forked, written pages are writable.
    assert replay_case(on_old_kernel(setup="no_fork")).mismatches
    # Facts on which all states agree are certain: zero pages, and pages that a child also maps.
    zero = on_old_kernel(before=[["zero", 8], ["shared", 24]], after=[["zero", 8], [0, 24]], max_ptes_shared=31)
    assert (replay_case(zero).mismatches, replay_case(zero).apart) == ((), "")
    both = written(tmp_path / "both.jsonl", on_old_kernel(), collapsed)
    done = run(str(both))
    assert done.exit_code == 0
    *_, apart, totals = done.stdout.splitlines()
    assert apart.startswith(f"apart 1, {WRITABLE}: ")
    assert totals == "cases 2, match 1, mismatch 0"
    assert json.loads(run("--json", str(both)).stdout)["apart"] == {WRITABLE: ["one"]}


def test_what_was_read_behind_the_page_table_is_counted_apart() -> None:
    """The run at 3 follows a folio with pages 1 and 2 left, and so on: the last would begin at 31."""
    states = [["anon", 1], ["large:2", 2], ["anon", 29]]
    of_series = {"kernel": "6.12.117", "series": "jain-rfc-2024-12", "before": states, "setup": "no_fork"}
    case = CASE | of_series | {"max_ptes_none": 16, "max_ptes_shared": 31, "scan_result": "page_null"}
    told = [[0, 1], [2, 2], [0, 2], [2, 24], [0, 3]]
    assert replay_case(case | {"after": told}).apart == BEYOND_TABLE
    # Pages before it are compared, pages after it are not.
    assert replay_case(case | {"after": [*told[:-1], [2, 3]]}).apart == BEYOND_TABLE
    assert replay_case(case | {"after": [[0, 32]]}).mismatches


def test_a_series_that_is_not_known_is_refused_unless_its_policy_is_named() -> None:
    with pytest.raises(UsageError, match="unknown series 'mine'"):
        replay_case(CASE | {"series": "mine"})
    assert replay_case(CASE | {"series": "mine"}, "mainline").mismatches == ()


FIRST = "from event 1 on:"


@pytest.mark.parametrize(
    ("what", "wanted", "found", "words"),
    [
        ("orders", [[2, 4], [0, 28]], [[0, 32]], ("PTEs 0-3: order 2", "PTEs 0-3: base pages")),
        ("orders", [["none", 1], [0, 31]], [[0, 32]], ("PTE 0: none", "PTE 0: base pages")),
        ("orders", [[2, 4]], [], ("PTEs 0-3: order 2", "PTEs 0-3: no entry")),
        ("flags", [["rs", 2]], [["", 2]], ("PTEs 0-1: referenced, shared", "PTEs 0-1: no flags")),
        ("moved", [[1, 2]], [[0, 2]], ("PTEs 0-1: moved", "PTEs 0-1: not moved")),
        ("events", [], [["collapse", 2, "failed", 3]], ("no events", f"{FIRST} collapse order 2: failed, 3 times")),
        ("swap_offsets", [[0, 5, 2]], [], ("2 from PTE 0 on in slots from 5 on", "no other swap entries")),
        ("stats", {"a": 1, "b": 2}, {"a": 1}, ("b 2", "b 0")),
        ("errno", 22, 0, ("22", "0")),
    ],
)  # fmt: skip
def test_differences_are_said_in_words(what: str, wanted: Any, found: Any, words: tuple[str, str]) -> None:
    assert difference(what, wanted, found) == words


def test_a_long_difference_is_cut() -> None:
    wanted, found = difference("orders", [[page % 2, 1] for page in range(16)], [[0, 16]])
    assert wanted.endswith("PTE 5: order 1; and 5 more")
    assert found.endswith("PTE 5: base pages; and 5 more")


def test_gzip_is_read(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(CASE).encode()))
    assert replay(read_cases(path)).matches == 1


@pytest.mark.parametrize(
    "content", [b"no json\n", b"[1]\n", b'{"id": 1}\n', b"\xff\xfe", json.dumps(CASE).encode()[:-9]]
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"cases\.jsonl"):
        list(read_cases(path))


@pytest.mark.parametrize("damage", ["cut", "no gzip"])
def test_a_damaged_gzip_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "cases.jsonl.gz"
    whole = gzip.compress(json.dumps(CASE).encode())
    path.write_bytes(whole[:-12] if damage == "cut" else b"plain text")
    with pytest.raises(UsageError, match=r"cases\.jsonl\.gz"):
        list(read_cases(path))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("geometry", "vax"),
        ("before", [["anon", 7]]),
        ("before", [["anonymous", 32]]),
        ("before", [["large:9", 32]]),
        ("before", 5),
        ("before", [["anon", -1], ["none", 33]]),
        ("before", [["anon", 10**12]]),
        ("before", [["anon:2", 32]]),
        ("before", [[["anon"], 32]]),
        ("before_flags", [["r", 31]]),
        ("before_flags", [[1, 32]]),
        ("after", [[2, 31]]),
        ("after_pass1", [[2, 31]]),
        ("trigger", "kswapd"),
        ("orders_enabled", [6]),
        ("orders_enabled", ["2"]),
        ("orders_enabled", 2),
        ("max_ptes_none", 32),
        ("max_ptes_swap", "4"),
        ("max_ptes_shared", None),
        ("vma", ["hugetlb"]),
        ("kernel", "newest"),
        ("swap_offsets", [[0, 1]]),
        ("swap_offsets", [[31, 1, 2]]),
        ("swap_offsets", [[0, 0, 1]]),
        ("swap_offsets", [[0, 10**12, 1]]),
        ("passes", [7]),
        ("passes", [{"stats": {"full_scans": "1"}}]),
        ("passes", [{"flags": [["m", 33]]}]),
    ],
)
def test_a_case_that_cannot_be_is_refused(key: str, value: object) -> None:
    with pytest.raises(UsageError, match="case one: "):
        replay_case(CASE | {key: value})


def test_two_entries_with_one_slot_are_refused() -> None:
    swapped = {"before": [["swap", 8], ["none", 24]], "swap_offsets": [[0, 1, 4], [4, 4, 4]]}
    with pytest.raises(UsageError, match="one slot"):
        replay_case(CASE | swapped)


def _damaged(chance: random.Random, part: Any, depth: int = 0) -> Any:
    """Return the JSON value with one thing in it gone, or made something else."""
    junk: list[Any] = [
        None,
        [],
        {},
        "",
        "x",
        -1,
        0,
        1.5,
        10**12,
        True,
        [["anon", "3"]],
        [[1]],
        ["a"],
        [99],
        [[0, 0, 0]],
        "7.x",
    ]
    if not isinstance(part, dict | list) or not part or (depth and chance.random() < 0.3):
        return chance.choice(junk)
    key: Any = chance.choice(list(part)) if isinstance(part, dict) else chance.randrange(len(part))
    if chance.random() < 0.25:
        del part[key]
    else:
        part[key] = _damaged(chance, part[key], depth + 1)
    return part


def test_a_damaged_case_is_replayed_or_refused(tmp_path: Path) -> None:
    whole = CASE | {
        "kernel": "7.2.13", "vma": ["mlocked"], "setup": "no_fork", "before_flags": [["mr", 7], ["", 25]],
        "swap_offsets": [[3, 9, 2]], "scan_result": "succeeded",
        "passes": [{"scan": None, "events": [["isolate", 2, "succeeded", 0, 4, 1]], "stats": {"full_scans": 1}}],
    }  # fmt: skip
    refused = 0
    for seed in range(300):
        case = _damaged(random.Random(seed), copy.deepcopy(whole))
        try:
            replay(read_cases(written(tmp_path / "case.jsonl", case)))
        except UsageError:
            refused += 1
    assert 0 < refused < 300


def test_fields_that_nobody_knows_are_passed_over() -> None:
    assert replay_case(CASE | {"weather": "fine", "setup": "by hand"}).mismatches == ()


def test_without_passes_the_scan_result_and_the_counters_of_the_case_are_compared() -> None:
    assert (
        replay_case(
            CASE
            | {
                "scan_result": "succeeded",
                "stats": {"full_scans": 1, "pages_collapsed": 1}
                | {"hugepages-256kB/collapse_alloc": 1, "hugepages-256kB/nr_anon": 1},
            }
        ).mismatches
        == ()
    )
    (wrong,) = replay_case(CASE | {"scan_result": "failed"}).mismatches
    assert (wrong.where, wrong.expected, wrong.got) == ("pass 1: scan_result", "failed", "succeeded")
    (wrong,) = replay_case(CASE | {"stats": {}}).mismatches
    assert wrong.where == "pass 1: stats"


@pytest.mark.parametrize(
    ("before", "vma", "after", "result"),
    [
        ([["anon", 31], ["lazyfree", 1]], [], [[0, 32]], "page_lazyfree"),
        ([["anon", 31], ["lazyfree_dirty", 1]], [], [[2, 32]], "succeeded"),
        ([["cold", 32]], [], [[0, 32]], "lack_referenced_page"),
        ([["mlocked", 32]], ["mlocked"], [[2, 32]], "succeeded"),
        ([["anon", 32]], ["droppable"], [[2, 32]], "succeeded"),
    ],
)
def test_without_flags_pages_have_those_of_their_state(
    before: list[list[Any]], vma: list[str], after: list[list[Any]], result: str
) -> None:
    case = CASE | {"before": before, "vma": vma, "after": after, "scan_result": result}
    assert replay_case(case).mismatches == ()


def test_what_was_seen_shared_the_child_has_too() -> None:
    shared = {"before": [["anon", 32]], "before_flags": [["r", 30], ["rs", 2]], "max_ptes_shared": 1}
    case = CASE | shared | {"after": [[0, 32]], "scan_result": "exceed_shared_pte"}
    assert replay_case(case).mismatches == ()


def test_a_large_folio_that_may_be_dropped_is_seen_as_such() -> None:
    flags = [["lr", 32]]
    case = CASE | {"before": [["large:4", 16], ["anon", 16]], "before_flags": flags, "vma": ["droppable"]}
    recorded = [
        {"events": [["isolate", 5, "succeeded", 0, 32, 1], ["collapse", 5, "succeeded", 1]], "flags": [["l", 32]]}
    ]
    assert replay_case(case | {"orders_enabled": [5], "after": [[5, 32]], "passes": recorded}).mismatches == ()


def test_a_folio_of_which_some_pages_are_seen_used_is_used_through_their_entries() -> None:
    case = CASE | {"before": [["large:4", 16], ["none", 16]], "before_flags": [["", 13], ["r", 3], ["", 16]]}
    scan = {"result": "failed", "referenced": 3, "none_or_zero": 16, "unmapped": 0}
    done = replay_case(case | {"after": [[4, 16], ["none", 16]], "passes": [{"scan": scan}]})
    assert done.mismatches == ()


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="missing"):
        list(read_cases(tmp_path / "missing.jsonl"))
