"""Sizes, durations and shares: accepted texts, and the errors of others."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mthp.errors import UsageError
from mthp.units import (
    MAX_DURATION_NS,
    MAX_SIZE,
    above_zero,
    format_size,
    parse_duration,
    parse_factor,
    parse_order_or_size,
    parse_rate,
    parse_share,
    parse_share_or_size,
    parse_size,
)

KIB, MIB = 1 << 10, 1 << 20
PARSERS = [parse_size, parse_rate, parse_duration, parse_share, parse_share_or_size]
SECOND = 10**9


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("1", 1), ("1K", KIB), ("1.5G", 3 << 29), ("2 MiB", 2 * MIB), ("0.5k", 512), ("1T", 1 << 40), ("7B", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "value",
    ["", "K", "1.2", "0.3K", "1Z", "1 2K", "nan", "inf", "-1", "1,5G", "8E", "9" * 400, "٣K", True, None, 1.5, -1],
)
def test_sizes_that_cannot_be(value: object) -> None:
    with pytest.raises(UsageError):
        parse_size(value)


@given(st.integers(0, 4), st.integers(1, 1023))
def test_whole_numbers_of_a_unit_read_back(unit: int, number: int) -> None:
    size = number << 10 * unit
    assert parse_size(format_size(size)) == size


def test_a_size_without_a_unit_is_refused_where_bytes_are_hardly_meant() -> None:
    assert parse_size(500) == 500
    assert parse_size("0", bare=False) == 0
    assert parse_size("500B", bare=False) == 500
    with pytest.raises(UsageError, match="'500' has no unit: it would be 500 bytes") as refused:
        parse_size("500", bare=False)
    assert "500M" in refused.value.help
    assert "500B" in refused.value.help


def test_the_largest_size() -> None:
    assert parse_size(str(MAX_SIZE)) == MAX_SIZE
    with pytest.raises(UsageError, match="too large"):
        parse_size(MAX_SIZE + 1)


@pytest.mark.parametrize(("text", "rate"), [("500M", 500 * MIB), ("2G/s", 2 << 30), ("64 K / s", 64 * KIB)])
def test_rates(text: str, rate: int) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("value", ["500", 500, "500M/h", "/s", "0", "0M/s", 0, ""])
def test_rates_that_cannot_be(value: object) -> None:
    with pytest.raises(UsageError):
        parse_rate(value)


def test_folio_sizes() -> None:
    assert parse_order_or_size(" Order = 4 ") == (4, None)
    assert parse_order_or_size("64K") == (None, 64 * KIB)
    with pytest.raises(UsageError):
        parse_order_or_size("order=")


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("90s", 90 * SECOND),
        ("2m", 120 * SECOND),
        ("2min", 120 * SECOND),
        ("1h", 3600 * SECOND),
        ("500us", 500_000),
        ("1.5 ms", 1_500_000),
        ("7ns", 7),
        ("0", 0),
    ],
)
def test_durations(text: str, nanoseconds: int) -> None:
    assert parse_duration(text) == nanoseconds


@pytest.mark.parametrize(("value", "seconds"), [("5", 5), (5, 5), (0.1, 0.1), ("500ms", 0.5), (1e-7, 1e-7)])
def test_a_duration_without_a_unit_is_seconds_where_they_are_documented(value: object, seconds: float) -> None:
    assert parse_duration(value, bare="s") / 1e9 == seconds


@pytest.mark.parametrize(
    "value", ["1", 1, "", "s", "1e3s", "-1s", "1M", "9" * 19 + "s", "9" * 400 + "s", True, math.inf]
)
def test_durations_that_cannot_be(value: object) -> None:
    with pytest.raises(UsageError):
        parse_duration(value)


def test_the_longest_duration() -> None:
    assert parse_duration(f"{MAX_DURATION_NS}ns") == MAX_DURATION_NS
    with pytest.raises(UsageError, match="too long"):
        parse_duration(f"{MAX_DURATION_NS + 1}ns")


@pytest.mark.parametrize(
    ("value", "share"),
    [("20%", 0.2), ("0.2", 0.2), (0.2, 0.2), (" 99.9 % ", 0.999), ("0", 0), (0, 0), ("100%", 1), ("1.0", 1), (1.0, 1)],
)
def test_shares(value: object, share: float) -> None:
    assert parse_share(value) == share


@pytest.mark.parametrize(
    "value", ["", "%", "101%", "1.5", 1.5, "-5%", "a%", "5%%", "nan", math.nan, "1e1", "9" * 400, True]
)
def test_shares_that_cannot_be(value: object) -> None:
    with pytest.raises(UsageError):
        parse_share(value)


@pytest.mark.parametrize(("value", "factor"), [("200%", 2.0), (2.0, 2.0), ("20%", 0.2), ("0.5", 0.5), (0, 0.0)])
def test_factors(value: object, factor: float) -> None:
    assert parse_factor(value) == factor


@pytest.mark.parametrize("value", ["2", "-5%", "nan", "9" * 400, True])
def test_factors_that_cannot_be(value: object) -> None:
    with pytest.raises(UsageError):
        parse_factor(value)


@pytest.mark.parametrize(
    ("value", "help"), [("95", "write 95% or 0.95"), (1, "write 1% or 100%"), ("100", "write 100%")]
)
def test_a_whole_number_is_refused_as_a_share_with_both_ways_to_write_it(value: object, help: str) -> None:
    with pytest.raises(UsageError, match="has no unit") as refused:
        parse_share(value)
    assert help in refused.value.help


def test_a_budget_is_a_share_or_a_size() -> None:
    assert parse_share_or_size("5%") == (0.05, None)
    assert parse_share_or_size("0.05") == (0.05, None)
    assert parse_share_or_size("64M") == (None, 64 * MIB)
    assert parse_share_or_size("0") == (None, 0)
    for text in ("", "x%", "64X", "-1", "200%", "1.5"):
        with pytest.raises(UsageError):
            parse_share_or_size(text)
    with pytest.raises(UsageError, match="'5' has no unit: it may be a share or a size") as refused:
        parse_share_or_size("5")
    assert "5%" in refused.value.help
    assert "5B" in refused.value.help


@pytest.mark.parametrize("parse", PARSERS)
@given(value=st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.none(), st.just([1])))
def test_whatever_is_written_it_is_read_or_refused_with_an_instruction(
    parse: Callable[[object], object], value: object
) -> None:
    with contextlib.suppress(UsageError):
        parse(value)
        return
    with pytest.raises(UsageError) as refused:
        parse(value)
    assert refused.value.help
    assert len(refused.value.message) < 160


@pytest.mark.parametrize("parse", PARSERS)
@pytest.mark.parametrize("value", [10**5000, -(10**5000), "9" * 10**6, "0." + "1" * 10**6 + "%"], ids=range(4))
def test_numbers_of_thousands_of_digits_are_refused_shortly(parse: Callable[[object], object], value: object) -> None:
    with pytest.raises(UsageError) as refused:
        parse(value)
    assert len(refused.value.message) < 160


def test_what_must_not_be_0() -> None:
    above_zero("1ns", 1)
    with pytest.raises(UsageError, match="'0%' is not above 0"):
        above_zero("0%", 0.0)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0"),
        (1023, "1023"),
        (KIB, "1K"),
        (64 * KIB, "64K"),
        (2 * MIB, "2M"),
        (3 << 29, "1.5G"),
        (1 << 40, "1T"),
        (-64 * KIB, "-64K"),
    ],
)
def test_sizes_as_people_write_them(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, 1 << 50))
def test_a_written_size_is_off_by_a_twentieth_of_its_unit_at_most(size: int) -> None:
    text = format_size(size)
    unit = {"K": 10, "M": 20, "G": 30, "T": 40, "P": 50}.get(text[-1], 0)
    number = Fraction(text.rstrip("KMGTP"))
    assert abs(number * 2**unit - size) <= Fraction(2**unit, 20)
