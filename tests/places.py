"""Where the tests find what is stored in the repository."""

from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
GOLDEN = TESTS / "golden"
EXAMPLE = ROOT / "examples" / "tiny-mixtral"
