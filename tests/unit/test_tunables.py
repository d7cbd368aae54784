"""khugepaged's knobs and the per-size switches: defaults, bounds, and the texts of sysfs."""

from __future__ import annotations

import dataclasses

import pytest

from mthp.errors import UsageError
from mthp.geometry import GEOMETRIES, X86_64, Geometry, geometry_named
from mthp.tunables import LIMITS, Switches, Tunables, chosen_word

EVERY = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)


@EVERY
def test_defaults_follow_the_ptes_of_a_pmd_range(geometry: Geometry) -> None:
    tunables = Tunables.defaults(geometry)
    n = geometry.ptes_per_pmd
    assert dataclasses.asdict(tunables) == {
        "max_ptes_none": n - 1,
        "max_ptes_swap": n // 8,
        "max_ptes_shared": n // 2,
        "pages_to_scan": 8 * n,
        "scan_sleep_millisecs": 10_000,
        "alloc_sleep_millisecs": 60_000,
        "defrag": True,
    }
    assert tunables.checked(geometry) is tunables


@EVERY
@pytest.mark.parametrize("name", LIMITS)
def test_limits_end_at_the_ptes_less_one(geometry: Geometry, name: str) -> None:
    defaults = Tunables.defaults(geometry)
    highest = geometry.ptes_per_pmd - 1
    for value in (0, highest):
        assert getattr(defaults.replaced(geometry, **{name: value}), name) == value
    for value in (-1, highest + 1, 1 << 40):
        with pytest.raises(UsageError, match=name) as caught:
            defaults.replaced(geometry, **{name: value})
        assert str(value) in caught.value.message
        assert str(highest) in caught.value.message


@pytest.mark.parametrize(
    ("name", "value"), [("pages_to_scan", 0), ("scan_sleep_millisecs", -1), ("alloc_sleep_millisecs", -5)]
)
def test_a_pace_that_cannot_be(name: str, value: int) -> None:
    with pytest.raises(UsageError, match=name):
        Tunables.defaults(X86_64).replaced(X86_64, **{name: value})


def test_none_keeps_a_value() -> None:
    defaults = Tunables.defaults(X86_64)
    assert defaults.replaced(X86_64, max_ptes_none=None, max_ptes_swap=3) == dataclasses.replace(
        defaults, max_ptes_swap=3
    )


def test_sysfs_texts_as_the_kernel_prints_them() -> None:
    texts = {
        "max_ptes_none": "0\n",
        "max_ptes_swap": "64\n",
        "max_ptes_shared": "256\n",
        "pages_to_scan": "4096\n",
        "scan_sleep_millisecs": "500\n",
        "alloc_sleep_millisecs": "60000\n",
        "defrag": "0\n",
        "full_scans": "17\n",
        "pages_collapsed": "3\n",
    }
    assert Tunables.from_sysfs(texts, X86_64) == Tunables(0, 64, 256, 4096, 500, 60_000, False)


def test_a_missing_file_takes_its_default() -> None:
    assert Tunables.from_sysfs({}, X86_64) == Tunables.defaults(X86_64)
    assert Tunables.from_sysfs({"max_ptes_swap": "1"}, X86_64).max_ptes_none == 511


@pytest.mark.parametrize(("name", "text"), [("max_ptes_none", "many\n"), ("max_ptes_none", ""), ("defrag", "yes")])
def test_a_text_that_is_no_number(name: str, text: str) -> None:
    with pytest.raises(UsageError, match=name):
        Tunables.from_sysfs({name: text}, X86_64)


def test_a_sysfs_limit_of_another_geometry_is_refused() -> None:
    with pytest.raises(UsageError, match="max_ptes_none 511"):
        Tunables.from_sysfs({"max_ptes_none": "511"}, geometry_named("ppc64-64k"))


def test_defrag_is_a_bool() -> None:
    assert Tunables.from_sysfs({"defrag": "1"}, X86_64).defrag is True


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("always [madvise] never\n", "madvise"),
        ("[always] madvise never", "always"),
        ("always madvise [never]", "never"),
        ("never\n", "never"),
    ],
)
def test_the_chosen_word(text: str, word: str) -> None:
    assert chosen_word(text, ("always", "madvise", "never"), "enabled") == word


@pytest.mark.parametrize("text", ["", "always madvise never", "[always] [never]", "[sometimes] never", "[]"])
def test_texts_without_a_choice(text: str) -> None:
    with pytest.raises(UsageError, match="enabled"):
        chosen_word(text, ("always", "madvise", "never"), "enabled")


def test_switches_of_a_fresh_kernel() -> None:
    switches = Switches.defaults(X86_64)
    assert switches.orders(advised=True) == (9,)
    assert switches.orders(advised=False) == ()


@pytest.mark.parametrize(
    ("top", "advised", "orders"),
    [
        ("always", True, (2, 4, 9)),
        ("always", False, (2, 9)),
        ("madvise", True, (2, 4, 9)),
        ("madvise", False, (2,)),
        ("never", True, (2, 4)),
        ("never", False, (2,)),
    ],
)
def test_words_of_the_sizes_and_of_the_top(top: str, advised: bool, orders: tuple[int, ...]) -> None:
    switches = Switches(top, {9: "inherit", 4: "madvise", 2: "always", 3: "never"})
    assert switches.orders(advised=advised) == orders


def test_switches_read_from_sysfs() -> None:
    texts = {
        "enabled": "always [madvise] never\n",
        "hugepages-8kB/enabled": "[always] inherit madvise never\n",
        "hugepages-16kB/enabled": "always inherit madvise [never]\n",
        "hugepages-64kB/enabled": "[always] inherit madvise never\n",
        "hugepages-2048kB/enabled": "always [inherit] madvise never\n",
        "hugepages-4096kB/enabled": "[always] inherit madvise never\n",
        "defrag": "always defer defer+madvise [madvise] never\n",
    }
    assert Switches.from_sysfs(texts, X86_64) == Switches("madvise", {2: "never", 4: "always", 9: "inherit"})


def test_a_kernel_without_sizes_has_the_pmd_size() -> None:
    switches = Switches.from_sysfs({"enabled": "[always] madvise never"}, X86_64)
    assert switches.orders(advised=False) == (9,)


def test_a_kernel_without_thp_has_nothing() -> None:
    assert Switches.from_sysfs({}, X86_64).orders(advised=True) == ()


def test_words_that_no_kernel_knows() -> None:
    with pytest.raises(UsageError, match="enabled"):
        Switches("inherit")
    with pytest.raises(UsageError, match="order 4"):
        Switches("always", {4: "perhaps"})
    with pytest.raises(UsageError, match="hugepages-64kB"):
        Switches.from_sysfs({"enabled": "[never]", "hugepages-64kB/enabled": "[perhaps]"}, X86_64)
