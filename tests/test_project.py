"""Rules about the sources themselves: who may import whom, how long things get, and what the package contains."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from enum import StrEnum
from fnmatch import fnmatch
from importlib.metadata import distribution
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from places import ROOT
from typer.testing import CliRunner

import hcsmoe_hub.options
from hcsmoe_hub.cli.app import app
from hcsmoe_hub.machine.versions import LIBRARIES
from hcsmoe_hub.options import FormerRefit

LIBRARY = ROOT / "hcsmoe_hub"
COMMANDS = ROOT / "cli"
CARDS = ROOT / "model_cards"
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 400, 60, 6

# Installed name of every package, and the folder of its sources.
FOLDERS = {
    ".".join(("hcsmoe_hub", *([] if top == LIBRARY else [top.name]), *folder.relative_to(top).parts)): folder
    for top in (LIBRARY, COMMANDS, CARDS)
    for folder in sorted({file.parent for file in top.rglob("*.py")})
}
NETWORK = {"huggingface_hub", "datasets", "httpx", "httpx2", "requests", "urllib", "http", "socket", "aiohttp"}
NETWORK_FILES = {
    "calibration/completions.py",
    "calibration/rows.py",
    "hub/additions.py",
    "hub/address.py",
    "hub/client_download.py",
    "hub/read_errors.py",
    "hub/repository.py",
    "hub/retry.py",
    "hub/session.py",
    "hub/source.py",
    "hub/transfer.py",
    "hub/write_errors.py",
}
# Names and sizes of shards, names of errors, and the front matter of cards: nothing that opens a connection.
HARMLESS = {
    "huggingface_hub.split_state_dict_into_shards_factory",
    "huggingface_hub.errors",
    "huggingface_hub.repocard",
}
# What cards use of the client: formats of the Hub, and names.
CARD_FORMATS = {
    *HARMLESS,
    *(f"huggingface_hub.{name}" for name in ("ModelCard", "ModelCardData", "EvalResult", "EvalResultEntry")),
    "huggingface_hub.eval_result_entries_to_yaml",
    "huggingface_hub.utils.validate_repo_id",
    "huggingface_hub.utils.yaml_dump",
}
FORBIDDEN = ("except Exception", "TODO", "FIXME", "trust_remote_code=True", "torch.load(")


def sources(*tops: Path) -> list[Path]:
    """Every Python file below some folders."""
    found = [file for top in tops for file in sorted(top.rglob("*.py"))]
    assert found
    return found


def name_of(file: Path) -> str:
    """A file's name within the repository."""
    return file.relative_to(ROOT).as_posix()


def imports(file: Path) -> Iterator[str]:
    """Full names of everything that a file imports, wherever in the file: ``package.module`` or ``package.name``."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        match node:
            case ast.Import(names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module, names, level):
                assert level == 0, f"{name_of(file)} imports by a relative name"
                yield from (f"{module}.{alias.name}" for alias in names)


def is_within(name: str, packages: set[str]) -> bool:
    """Whether an imported name is one of some packages, or lies in one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def is_standard(name: str) -> bool:
    """Whether an imported name belongs to Python."""
    return name.partition(".")[0] in sys.stdlib_module_names


# Who reaches what; who imports whom is checked by import-linter


def test_only_a_few_files_reach_the_network() -> None:
    found = {
        file.relative_to(LIBRARY).as_posix()
        for file in sources(LIBRARY)
        for name in imports(file)
        if is_within(name, NETWORK) and not is_within(name, HARMLESS)
    }
    assert found == NETWORK_FILES


def test_cards_use_formats_of_the_hub_and_do_not_reach_it() -> None:
    found = {name for file in sources(CARDS) for name in imports(file) if is_within(name, NETWORK)}
    assert {name for name in found if not is_within(name, CARD_FORMATS)} == {"urllib.parse.urlsplit"}


def test_the_commands_import_what_is_installed_by_its_installed_name() -> None:
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"hcsmoe_hub"}
    found = {
        (name_of(file), name) for file in sources(COMMANDS, CARDS) for name in imports(file) if is_within(name, folders)
    }
    assert found == set()


def test_importing_the_commands_imports_no_heavy_library() -> None:
    heavy = {"torch", "transformers", "datasets", "huggingface_hub", "accelerate", "safetensors", "numpy", "scipy"}
    code = f"import sys, hcsmoe_hub, hcsmoe_hub.cli, hcsmoe_hub.cli.app; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_library_never_prints() -> None:
    found = [
        f"{name_of(file)}:{node.lineno}"
        for file in sources(LIBRARY, CARDS)
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "input")
    ]
    assert found == []


# How long, and how careful


def functions(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method of a file."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


OURS = (LIBRARY, COMMANDS, CARDS, ROOT / "benchmarks")


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {name_of(file): len(file.read_text("utf-8").splitlines()) for file in sources(*OURS, ROOT / "tests")}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_no_function_is_longer_than_60_lines() -> None:
    found = {
        f"{name_of(file)}:{node.name}": node.end_lineno - node.lineno + 1
        for file in sources(*OURS)
        for node in functions(file)
        if node.end_lineno is not None
    }
    assert {name: length for name, length in found.items() if length > MAX_FUNCTION_LINES} == {}


def test_no_function_has_more_than_six_parameters() -> None:
    found = {}
    for file in sources(*OURS):
        for node in functions(file):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(argument.arg not in ("self", "cls") for argument in given)
            is_command = file.parent == COMMANDS and node.name == file.stem
            if count > MAX_PARAMETERS and not is_command:
                found[f"{name_of(file)}:{node.name}"] = count
    assert found == {}


def test_nothing_that_hides_a_fault_is_written() -> None:
    found = [
        (name_of(file), words) for file in sources(*OURS) for words in FORBIDDEN if words in file.read_text("utf-8")
    ]
    assert found == []
    # What is caught is named, so that a bug is never taken for a known failure.
    bare = [
        f"{name_of(file)}:{node.lineno}"
        for file in sources(*OURS)
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert bare == []


def test_the_library_has_at_most_eight_files_at_its_root() -> None:
    assert len(list(LIBRARY.glob("*.py"))) <= 8


# Help


def enums() -> list[type[StrEnum]]:
    """Every choice that a conversion has; words of earlier reports are not choices."""
    kinds = [value for value in vars(hcsmoe_hub.options).values() if isinstance(value, type)]
    return [kind for kind in kinds if issubclass(kind, StrEnum) and kind not in (StrEnum, FormerRefit)]


@pytest.mark.parametrize("kind", enums(), ids=lambda kind: kind.__name__)
def test_every_choice_is_in_the_help(kind: type[StrEnum]) -> None:
    environment = {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}
    page = CliRunner().invoke(app, ["convert", "--help-methods"], env=environment, prog_name="hcsmoe").stdout
    words = page.replace(",", " ").replace(".", " ").split()
    assert [value for value in kind if value not in words] == []


# The package


@pytest.fixture(scope="module")
def project() -> Any:
    """The contents of ``pyproject.toml``."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_of_sources_is_packaged(project: Any) -> None:
    setuptools = project["tool"]["setuptools"]
    assert set(setuptools["packages"]) == FOLDERS.keys()
    places = {"hcsmoe_hub": "hcsmoe_hub"} | setuptools["package-dir"]
    for package, folder in FOLDERS.items():
        place = places.get(package, package.replace(".", "/"))
        assert ROOT / place == folder
        assert (folder / "__init__.py").is_file()


def test_every_data_file_is_packaged(project: Any) -> None:
    patterns = project["tool"]["setuptools"]["package-data"]
    packaged = {
        file
        for package, names in patterns.items()
        for pattern in names
        for file in FOLDERS[package].rglob("*")
        if fnmatch(file.relative_to(FOLDERS[package]).as_posix(), pattern)
    }
    data = {file for file in LIBRARY.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
    assert data - packaged == set()
    assert LIBRARY / "py.typed" in packaged
    assert CARDS / "card.md.jinja" in packaged
    assert LIBRARY / "calibration" / "data" / "bundled.jsonl" in packaged


def test_the_installed_package_brings_types_and_calibration_text() -> None:
    assert files("hcsmoe_hub").joinpath("py.typed").is_file()
    folder = files("hcsmoe_hub.calibration").joinpath("data")
    assert len(folder.joinpath("bundled.jsonl").read_text("utf-8").splitlines()) > 10
    assert folder.joinpath("NOTICE").is_file()


def test_licences_are_packaged(project: Any) -> None:
    assert all((ROOT / name).is_file() for name in project["project"]["license-files"])
    assert project["project"]["license"] == "Apache-2.0"


def test_the_installed_version_is_the_one_of_the_sources(project: Any) -> None:
    assert distribution("hcsmoe").version == project["project"]["version"]


def test_every_library_that_is_used_is_declared_and_no_other(project: Any) -> None:
    imported = {
        name.partition(".")[0]
        for file in sources(LIBRARY, COMMANDS, CARDS)
        for name in imports(file)
        if not is_standard(name)
    }
    extras = project["project"]["optional-dependencies"]

    def names(lines: list[str]) -> set[str]:
        return {line.partition(">")[0].partition("<")[0].strip().replace("-", "_") for line in lines}

    needed = names(project["project"]["dependencies"])
    optional = {name for extra, lines in extras.items() if extra not in ("dev", "docs") for name in names(lines)}
    # Reports name versions of libraries that work below those that are imported.
    assert needed <= imported | set(LIBRARIES)
    assert imported - {"hcsmoe_hub"} == (needed & imported) | optional
