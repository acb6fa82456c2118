"""Shared by all tests: no network, no surprises from the user's settings, and one line per architecture."""

import os
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).parent.parent


def _is_installed_elsewhere() -> bool:
    """Whether the package that is installed is a copy, and not an editable one that leads here."""
    try:
        installed = distribution("hcsmoe")
    except PackageNotFoundError:
        return False
    return (Path(str(installed.locate_file("hcsmoe_hub"))) / "__init__.py").is_file()


# ``python -m pytest`` puts the current folder first, whose hcsmoe_hub/ would hide the installed package: only the
# installed one has all of its parts.
if _is_installed_elsewhere():
    sys.path[:] = [place for place in sys.path if Path(place or os.getcwd()).resolve() != ROOT]

# Processes that tests start must import the installed package, not the source tree of the current folder.
os.environ["PYTHONSAFEPATH"] = "1"
# Two test processes on two cores only wait for each other's threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Read by the libraries when they are imported, so set before any test module imports them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


# Files in which every test builds a model of its own: several processes share them, last of all.
SPREAD = {"test_conformance.py", "test_mapped_architectures.py", "test_methods_everywhere.py", "test_router.py"}


class _ByFile(LoadScopeScheduling):
    """Lets one process run all tests of a file, so that none of its fixtures is made twice."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return nodeid if Path(file).name in SPREAD else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _ByFile:
    return _ByFile(config, log)


@pytest.fixture(scope="session", autouse=True)
def empty_current_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs all tests in an empty folder: results that a reader of the README has made must not matter."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("current"))
    yield
    os.chdir(before)


@pytest.fixture(scope="session", autouse=True)
def rates_of_these_tests(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps rates that busy test processes measure away from those of the user."""
    os.environ["HCSMOE_HOME"] = str(tmp_path_factory.mktemp("home"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Products of tiny blocks only wait for each other's threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints what each architecture's conformance test found."""
    reports = terminalreporter.stats.get("passed", [])
    lines = sorted(value for report in reports for name, value in report.user_properties if name == "line")
    if lines:
        terminalreporter.section("architectures")
        for line in lines:
            terminalreporter.write_line(line)
