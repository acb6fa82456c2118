"""Words of the command line become values."""

import pytest

from hcsmoe_hub.cli.values import choice, choices, parse_device, parse_shard_size, parse_size, parse_weights
from hcsmoe_hub.options import Linkage, Similarity


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("1.5 tb", 15 * 10**11), (" 200 MB ", 2 * 10**8), ("1kb", 1000)],
)
def test_sizes_are_decimal(text, size):
    assert parse_size(text) == size


def test_shard_size_is_handed_on_as_the_library_reads_it():
    assert parse_shard_size("1.5 gb") == "1.5GB"


def test_every_value_of_an_enum_is_accepted():
    assert [choice(Linkage)(word) for word in Linkage] == list(Linkage)


@pytest.mark.parametrize("word", ["auto", "cpu", "cuda", "cuda:0", "cuda:12"])
def test_device_of_any_number_is_accepted(word):
    assert parse_device(word) == word


def test_similarities_are_joined_with_plus_and_kept_in_order_and_number():
    parse = choices(Similarity)
    assert parse("weight") == (Similarity.WEIGHT,)
    assert parse("weight+expert-output") == (Similarity.WEIGHT, Similarity.EXPERT_OUTPUT)
    # Whether a value may be named twice is decided where a hint can be given.
    assert parse("weight+weight") == (Similarity.WEIGHT, Similarity.WEIGHT)


@pytest.mark.parametrize(("text", "weights"), [("2,1", (2.0, 1.0)), (" 0.5 , 0 ", (0.5, 0.0)), ("-1,1", (-1.0, 1.0))])
def test_dominant_weights_are_two_numbers(text, weights):
    assert parse_weights(text) == weights
