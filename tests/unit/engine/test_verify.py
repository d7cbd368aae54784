"""Expectations: their grammar, what meets them, and the output."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fakes import FakeSpace, page_runs
from mthp.cli import main
from mthp.engine.verify import Checked, Expectation, verify_space
from mthp.errors import UsageError
from mthp.ptes import Pte
from mthp.vma import Vma, VmaKind

BASE = 0x7F00_0000_0000
SIZE = 4 << 20
HUGE = Pte.PRESENT | Pte.PMD_MAPPED

ONE_OF_TWO = ((512, HUGE, 9), (256, Pte.PRESENT, 4), (256, Pte.PRESENT, 0))
"""4M: a half by a PMD entry, a quarter in folios of 64K, a quarter in base pages."""


def space(*vmas: Vma, runs: tuple[tuple[int, Pte, int], ...] = ONE_OF_TWO, **options: object) -> FakeSpace:
    return FakeSpace([(vma, *page_runs(*runs)) for vma in vmas], label="7 (redis)", **options)  # type: ignore[arg-type]


HEAP = Vma(BASE, BASE + SIZE, "rw-p", "[heap]")
SHARED = Vma(BASE + (1 << 30), BASE + (1 << 30) + SIZE, "rw-s", "/memfd:ram (deleted)", VmaKind.SHMEM)
RAM = Vma(BASE + (2 << 30), BASE + (2 << 30) + SIZE, "rw-p", "", flags=frozenset({"rd", "wr", "dc"}))


def checked(text: str, *vmas: Vma, **options: object) -> Checked:
    return verify_space(space(*vmas, **options), [Expectation.parse(text)]).checks[0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "mapping", "size", "least"),
    [
        ("2M>=95%", "", "2M", 0.95),
        (" 64K >= 0.5 ", "", "64K", 0.5),
        ("heap:order=4>=90%", "heap", "order=4", 0.9),
        ("/memfd:ram*:2M>=100%", "/memfd:ram*", "2M", 1.0),
        ("0x7f00:2M>=0%", "0x7f00", "2M", 0.0),
    ],
)
def test_expectations_are_read(text: str, mapping: str, size: str, least: float) -> None:
    expectation = Expectation.parse(text)
    assert (expectation.mapping, expectation.size, expectation.least) == (mapping, size, least)


@pytest.mark.parametrize(
    "text", ["", "2M", ">=1%", "2M>95%", "2M=95%", "2M>=", "2M>=x", "2M>=120%", "2M>=-1%", "x" * 999]
)
def test_what_is_no_expectation_says_how_to_write_one(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Expectation.parse(text)
    assert "%" in caught.value.help
    assert len(caught.value.message) < 200


@pytest.mark.parametrize(
    ("text", "verdict", "share"),
    [
        ("2M>=50%", "passed", 0.5),
        ("2M>=51%", "failed", 0.5),
        ("64K>=75%", "passed", 0.75),
        ("heap:64K>=75%", "passed", 0.75),
        ("0x7f0000000fff:2M>=50%", "passed", 0.5),
        ("stack:2M>=0%", "failed", None),
    ],
)
def test_what_meets_an_expectation(text: str, verdict: str, share: float | None) -> None:
    check = checked(text, HEAP)
    assert (check.verdict, check.share) == (verdict, share)
    assert bool(check.reason) == (verdict != "passed")


def test_a_mapping_counts_with_all_its_memory_and_the_process_with_the_anonymous_alone() -> None:
    assert checked("2M>=0%", HEAP, SHARED).resident_bytes == SIZE
    assert checked("/memfd:*:2M>=0%", HEAP, SHARED).resident_bytes == SIZE
    assert checked("*:2M>=0%", HEAP, SHARED).mappings == 2


def test_guest_ram_is_what_children_do_not_get_or_the_largest_mapping() -> None:
    assert checked("guest-ram:2M>=0%", HEAP, RAM).mappings == 1
    assert checked("guest-ram:2M>=0%", SHARED).resident_bytes == SIZE
    assert checked("guest-ram:2M>=0%").reason.startswith("no mapping is called guest-ram")


@pytest.mark.parametrize(
    ("mappings", "resident"),
    [
        ([(4, "rw-p", ""), (8, "rw-s", "")], 8),
        ([(4, "rw-p", ""), (8, "r--p", "")], 4),
        ([(4, "rw-p", "dc"), (2, "rw-p", "dc"), (8, "rw-p", "")], 6),
        # Too small for a guest, such as the ring of a device.
        ([(1, "rw-p", "dc"), (4, "rw-p", "")], 4),
    ],
)
def test_guest_ram_is_writable_and_at_least_a_pmd_range(mappings: list[tuple[int, str, str]], resident: int) -> None:
    described = []
    for at, (size, permissions, flags) in enumerate(mappings):
        start = BASE + (at << 30)
        vma = Vma(start, start + (size << 20), permissions, "", flags=frozenset(flags.split()))
        described.append((vma, *page_runs((size << 8, Pte.PRESENT, 0))))
    done = verify_space(FakeSpace(described, label="7 (qemu)"), [Expectation.parse("guest-ram:2M>=0%")])
    assert done.checks[0].resident_bytes == resident << 20


def test_an_address_names_the_one_mapping_that_it_lies_in() -> None:
    behind = Vma(BASE + SIZE, BASE + 2 * SIZE, "rw-p", "[stack]")
    assert checked(f"{BASE + SIZE:#x}:2M>=0%", HEAP, behind).mappings == 1


def test_memory_that_is_not_resident_meets_nothing() -> None:
    check = checked("heap:2M>=0%", HEAP, runs=((1024, Pte(0), -1),))
    assert (check.share, check.verdict, check.reason) == (None, "failed", "nothing of it is resident")


def test_what_cannot_be_seen_is_unknown_and_exits_with_3() -> None:
    some = space(HEAP, runs=((512, HUGE, 9), (512, Pte.PRESENT, -2)), missing=("page frames: run as root",))
    done = verify_space(some, [Expectation.parse(text) for text in ("2M>=50%", "64K>=90%")])
    assert [check.verdict for check in done.checks] == ["passed", "unknown"]
    assert done.checks[1].reason == "the folio sizes of 2M are not visible"
    assert done.missing == ("page frames: run as root",)
    assert done.exit_code == 3
    failed = verify_space(some, [Expectation.parse(text) for text in ("64K>=90%", "stack:2M>=1%")])
    assert ([check.verdict for check in failed.checks], failed.exit_code) == (["unknown", "failed"], 1)


class WithEntries(FakeSpace):
    """A process as a user without CAP_SYS_ADMIN sees it: PAGEMAP_SCAN shows PMD entries, and nothing the folios."""

    def shows_pmd_entries(self) -> bool:
        return True


def test_the_pmd_size_is_known_where_pmd_entries_are_visible() -> None:
    pages = page_runs((512, HUGE, 9), (512, Pte.PRESENT, -2))
    done = verify_space(WithEntries([(HEAP, *pages)]), [Expectation.parse(text) for text in ("2M>=90%", "1M>=90%")])
    assert [check.verdict for check in done.checks] == ["failed", "unknown"]


@pytest.fixture
def file(tmp_path: Path) -> str:
    snapshot = pytest.importorskip("mthp.snapshot")
    path = tmp_path / "a|b.parquet"
    snapshot.record(space(HEAP), path)
    return str(path)


def test_the_exit_code_and_the_table(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", file, "--expect", "2M>=50%"]) == 0
    assert main(["verify", file, "--expect", "2M>=50%", "--expect", "2M>=90%"]) == 1
    assert "50.0% is less than 90%" in capsys.readouterr().out
    assert main(["verify", file, "--expect", "3M>=50%"]) == 2
    assert main(["verify", file]) == 2
    assert main(["verify", "4194304", "--expect", "2M>=1%"]) == 4
    capsys.readouterr()
    assert main(["verify", file, "--expect", "2M>=90%", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["checks"][0]["share"] == 0.5


def test_junit_has_a_case_for_each_expectation(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["verify", file, "4194304", "--expect", "2M>=50%", "--expect", "heap:2M>=90%", "--format", "junit"]
    assert main(arguments) == 1
    suite = ElementTree.fromstring(capsys.readouterr().out.encode())
    assert suite.attrib == {"name": "mthp verify", "tests": "3", "failures": "1", "errors": "1"}
    assert [(case.get("classname"), [each.tag for each in case]) for case in suite] == [
        ("7 (redis)", []),
        ("7 (redis)", ["failure"]),
        ("4194304", ["error"]),
    ]


@pytest.mark.parametrize(
    ("expected", "code", "begins"),
    [
        (["2M>=50%"], 0, "MTHP OK - 1 expectation met | '7 (redis) 2M'=50.00%;50:;;0;100"),
        (["2M>=90%"], 1, "MTHP WARNING - 7 (redis) 2M>=90%: 50.0% is less than 90% | '7 (redis) 2M'=50.00%;90:;;0;100"),
        (["stack:2M>=90%"], 1, "MTHP WARNING - 7 (redis) stack:2M>=90%: no mapping is called stack"),
    ],
)
def test_a_line_for_nagios(
    file: str, expected: list[str], code: int, begins: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [word for each in expected for word in ("--expect", each)]
    assert main(["verify", file, *options, "--format", "nagios"]) == code
    said = capsys.readouterr().out
    assert said.startswith(begins)
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("target", "expected", "begins"),
    [
        ("4194304", "2M>=1%", "no process 4194304"),
        ("self", "2M", "'2M' is not an expectation"),
        ("self", "3M>=1%", "'3M' is not a folio size"),
        ("/nothing/there", "2M>=1%", "target '/nothing/there' is neither"),
    ],
)
def test_what_goes_wrong_is_unknown_to_nagios(
    target: str, expected: str, begins: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", target, "--expect", expected, "--format", "nagios"]) == 3
    assert capsys.readouterr().out.startswith(f"MTHP UNKNOWN - {begins}")


def test_several_targets_have_a_sum(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snapshot = pytest.importorskip("mthp.snapshot")
    none, empty = (str(tmp_path / name) for name in ("none.parquet", "empty.parquet"))
    snapshot.record(space(HEAP, runs=((1024, Pte.PRESENT, 0),)), none)
    snapshot.record(space(HEAP, runs=((1024, Pte(0), -1),)), empty)
    assert main(["verify", file, none, empty, "--expect", "2M>=50%"]) == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("in all"))
    assert line.split()[2:] == ["2M>=50%", "8M", "25.0%", "1", "of", "3", "passed"]
    assert main(["verify", file, "--expect", "2M>=50%"]) == 0
    assert "in all" not in capsys.readouterr().out
