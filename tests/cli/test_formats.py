"""Numbers as a person reads them."""

import pytest

from hcsmoe_hub.machine.units import (
    format_bytes,
    format_change,
    format_count,
    format_list,
    format_mean,
    format_percent,
    format_plural,
    format_range,
    format_seconds,
)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KB"),
        (999_949, "999.9 KB"),
        (999_950, "1.0 MB"),
        (93_405_585_408, "93.4 GB"),
        (2 * 10**15, "2000.0 TB"),
    ],
)
def test_bytes_are_decimal_with_one_digit(number, text):
    assert format_bytes(number) == text


@pytest.mark.parametrize(
    ("number", "text"), [(12, "12"), (1903744, "1.90 M"), (46_702_792_704, "46.70 B"), (999_999, "1.00 M")]
)
def test_counts_have_two_digits(number, text):
    assert format_count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.9, "9.9 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (400, "6 min 40 s"), (7500, "2 h 5 min")],
)
def test_durations_have_two_units(seconds, text):
    assert format_seconds(seconds) == text


def test_change_is_signed_and_empty_without_one():
    assert format_change({"before": 200, "after": 100}) == "-50.0 %"
    assert format_change({"before": 200, "after": 200}) == ""
    assert format_change({"before": 1_000_000, "after": 999_999}) == ""


def test_shares_have_one_digit_and_their_error():
    assert (format_percent(0.871), format_percent(0.871, 0.012)) == ("87.1 %", "87.1 ± 1.2 %")


def test_ranges_are_as_short_as_they_can_be():
    assert (format_range([4, 4]), format_range([5, 3, 4])) == ("4", "3 to 5")


def test_items_are_listed_as_in_a_sentence():
    assert [format_list(["a", "b", "c"][:count], "or") for count in (1, 2, 3)] == ["a", "a or b", "a, b or c"]


def test_nouns_follow_their_number():
    assert [format_plural(number, "shard") for number in (0, 1, 2)] == ["0 shards", "1 shard", "2 shards"]


def test_mean_is_over_what_is_defined():
    assert format_mean([0.25, None, 0.5]) == "0.375"
    assert format_mean([3, 4], digits=1) == "3.5"
    assert format_mean([None]) == format_mean([]) == "-"
