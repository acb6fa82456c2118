"""Two ranks that all tests of a session share: starting them takes longer than any conversion."""

from collections.abc import Iterator

import pytest
from rank_pair import RankPair


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPair]:
    """Two processes that convert together."""
    found = RankPair(tmp_path_factory.mktemp("pair"))
    yield found
    found.close()
