"""Words of the command line become values."""

import pytest

from hcsmoe_hub.cli.values import choice, parse_device, parse_shard_size, parse_size
from hcsmoe_hub.options import Linkage


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
