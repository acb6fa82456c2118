"""Lists of layers and experts become numbers."""

import pytest

from hcsmoe_hub.cli.expert_lists import parse_layers, parse_protected
from hcsmoe_hub.machine.units import format_numbers


@pytest.mark.parametrize(
    ("text", "layers"),
    [("0-3", (0, 1, 2, 3)), ("1,3,5-7", (1, 3, 5, 6, 7)), (" 9, 2 - 3 ", (2, 3, 9)), ("4,4,3-5", (3, 4, 5))],
)
def test_layers_are_ascending_and_named_once(text, layers):
    assert parse_layers(text) == layers


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([3], "3"), ([0, 1], "0-1"), ([0, 1, 2, 5, 7, 8], "0-2,5,7-8")]
)
def test_numbers_are_shown_as_ranges_that_can_be_read_again(numbers, text):
    assert format_numbers(numbers) == text
    assert not numbers or list(parse_layers(text)) == numbers


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("3:17", ((3, 17),)),
        ("*:2", ((None, 2),)),
        ("2", ((None, 2),)),
        ("1:0-2, 4", ((1, 0), (1, 1), (1, 2), (None, 4))),
        ("0-1:5", ((0, 5), (1, 5))),
        ("1:2,1:2,*:2", ((1, 2), (None, 2))),
    ],
)
def test_protected_experts_are_pairs(text, pairs):
    assert parse_protected(text) == pairs


@pytest.mark.parametrize("prefix", ["", "@"])
def test_protected_experts_of_a_file_may_have_comments(tmp_path, prefix):
    file = tmp_path / "experts.txt"
    file.write_text("# heads that speak French\n3:17,  *:0-1\n\n5  # everywhere\n")
    assert parse_protected(f"{prefix}{file}") == ((3, 17), (None, 0), (None, 1), (None, 5))


def test_empty_file_protects_no_expert(tmp_path):
    file = tmp_path / "experts.txt"
    file.write_text("# nobody\n")
    assert parse_protected(f"@{file}") == ()


def test_list_longer_than_a_file_name_is_read():
    pairs = tuple((layer, 0) for layer in range(1000))
    assert parse_protected(",".join(f"{layer}:{expert}" for layer, expert in pairs)) == pairs
