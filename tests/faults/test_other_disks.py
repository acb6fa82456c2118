"""Disks, rights, clocks and other conversions around a conversion: one message each, and nothing is lost."""

from collections.abc import Callable
from typing import Any

import pytest

TEN_YEARS = 315_360_000


def message(end: dict[str, Any]) -> str:
    """The message of a command that has failed, which is one, with a hint."""
    lines = end["text"].strip().splitlines()
    assert (end["code"], lines[0][:7], lines[1][:6]) == (1, "Error: ", "Hint: "), end
    assert len(lines) <= 3
    return str(lines[0])


def test_a_conversion_changes_nothing_outside_of_its_folders(ask: Callable[..., Any]) -> None:
    """With a card, a statistics file, a figure, code of its own and a model that is trained as a whole."""
    for variant in ("statistics", "mapped", "model"):
        assert ask("changes", variant=variant) == []


def test_a_full_disk_of_the_measured_rates_does_not_matter(ask: Callable[..., Any]) -> None:
    end = ask("fill", place="home", variant="plain")
    assert (end["code"], end["text"], end["differences"]) == (0, "", [])


def test_a_full_disk_of_the_statistics_is_named(ask: Callable[..., Any]) -> None:
    end = ask("fill", place="statistics", variant="statistics")
    assert "the statistics file" in message(end)
    assert "No space left on device" in message(end)


def test_a_limit_on_the_size_of_files_is_named(ask: Callable[..., Any]) -> None:
    end = ask("limit", variant="plain", size=12_000)
    assert message(end).startswith("Error: File too large: ")
    assert "--max-shard-size" in end["text"]


def test_a_folder_that_may_not_be_written_to_is_refused(ask: Callable[..., Any]) -> None:
    end = ask("forbid", place="output", variant="plain")
    assert message(end).endswith("cannot be written to.")
    assert (end["changed"], end["made"]) == ([], [])


def test_a_statistics_file_that_may_not_be_written_is_refused(ask: Callable[..., Any]) -> None:
    end = ask("forbid", place="statistics", variant="statistics")
    assert "Permission denied" in message(end)
    assert end["changed"] == []


@pytest.mark.parametrize("place", ["source", "home"])
def test_a_source_and_rates_that_can_only_be_read_are_enough(ask: Callable[..., Any], place: str) -> None:
    end = ask("forbid", place=place, variant="plain")
    assert (end["code"], end["text"], end["changed"]) == (0, "", [])
    assert "output/config.json" in end["made"]


@pytest.mark.parametrize("seconds", [TEN_YEARS, -TEN_YEARS])
def test_a_clock_that_jumps_changes_nothing(ask: Callable[..., Any], seconds: int) -> None:
    end = ask("jump", variant="plain", after=20, seconds=seconds)
    assert (end["code"], end["text"], end["differences"]) == (0, "", [])


def test_of_two_conversions_to_one_folder_the_first_wins(ask: Callable[..., Any]) -> None:
    end = ask("meet", variant="plain", at=60)
    assert "another conversion is writing to" in message(end["second"])
    assert (end["code"], end["text"], end["differences"]) == (0, "", [])


def test_of_two_conversions_that_begin_at_once_one_is_refused(ask: Callable[..., Any]) -> None:
    for at in (1, 2, 3):
        end = ask("meet", variant="plain", at=at)
        assert sorted([end["code"], end["second"]["code"]]) == [0, 1]
        message(end if end["code"] else end["second"])
        assert end["differences"] == []
