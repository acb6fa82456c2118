"""Two conversions of one repository with one cache at once, where ``flock`` succeeds for everybody."""

from pathlib import Path

import pytest

from hub.together import WAYS, Weights, build_no_locks, convert_alone, convert_together


@pytest.fixture(scope="module")
def no_locks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_no_locks(tmp_path_factory.mktemp("library"))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return convert_alone(tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("way", WAYS)
def test_both_conversions_are_right(way: str, no_locks: Path, expected: Weights, tmp_path: Path) -> None:
    assert convert_together(tmp_path, expected, WAYS[way], no_locks) == []
