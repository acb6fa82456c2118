"""A tiny model, and results of it in every layout."""

import shutil
from pathlib import Path

import pytest
from recovered import write_text
from short_training import build_loud
from tiny_models import options

from hcsmoe_hub import MethodOptions, convert
from hcsmoe_hub.options import Layout, Preset


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model``, a Mixtral of 8 experts in 2 layers, and ``result`` with 4 of them."""
    folder = tmp_path_factory.mktemp("recovered")
    source = build_loud(folder / "model")
    write_text(source)
    convert(source, options(source, 4, method=MethodOptions(preset=Preset.REAP)))
    return folder


@pytest.fixture
def source(made: Path, tmp_path: Path) -> Path:
    """The model of a folder that tests may change; ``result`` lies next to it."""
    shutil.copytree(made, tmp_path / "own")
    return tmp_path / "own" / "model"


@pytest.fixture(scope="session")
def made_mapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a result in the mapped layout."""
    folder = tmp_path_factory.mktemp("mapped")
    source = build_loud(folder / "model")
    write_text(source)
    convert(source, options(source, 4, method=MethodOptions(preset=Preset.HC_SMOE, layout=Layout.MAPPED)))
    return folder


@pytest.fixture(scope="session")
def made_factored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a result in the factored layout."""
    folder = tmp_path_factory.mktemp("factored")
    source = build_loud(folder / "model")
    write_text(source)
    convert(source, options(source, 4, method=MethodOptions(preset=Preset.HC_SMOE, compress="4,80%")))
    return folder
