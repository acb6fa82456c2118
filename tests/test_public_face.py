"""What ``import hcsmoe_hub`` offers, and what it costs."""

import subprocess
import sys
from importlib.metadata import version
from types import FunctionType

import pytest

import hcsmoe_hub

FUNCTIONS = ["convert", "evaluate", "execute", "plan", "push", "recover", "verify", "write_card"]


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_every_name_is_there_and_listed() -> None:
    missing = [name for name in hcsmoe_hub.__all__ if not hasattr(hcsmoe_hub, name)]
    assert missing == []
    assert set(hcsmoe_hub.__all__) <= set(dir(hcsmoe_hub))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_stories_are_functions(name: str) -> None:
    assert isinstance(getattr(hcsmoe_hub, name), FunctionType)


def test_the_version_is_the_installed_one() -> None:
    assert hcsmoe_hub.__version__ == version("hcsmoe")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'plan_conversion'"):
        hcsmoe_hub.plan_conversion  # noqa: B018


@pytest.mark.parametrize(
    "before",
    [
        "",
        "import hcsmoe_hub.convert, hcsmoe_hub.push, hcsmoe_hub.recover",
        "import hcsmoe_hub.publishing.publisher",
    ],
)
def test_convert_push_and_recover_are_the_functions_whatever_was_imported_before(before: str) -> None:
    names = ("convert", "push", "recover")
    code = f"{before}\nimport hcsmoe_hub\nprint(*(type(getattr(hcsmoe_hub, name)).__name__ for name in {names}))"
    assert run(code) == "function function function\n"


def test_importing_it_and_making_options_imports_no_heavy_library() -> None:
    heavy = {"torch", "transformers", "datasets", "huggingface_hub", "accelerate", "safetensors", "numpy", "scipy"}
    code = (
        "import sys; from hcsmoe_hub import *; from hcsmoe_hub import ConvertOptions\n"
        "ConvertOptions(experts=4); hcsmoe_hub.RecoverOptions(teacher='a', data='b')\n"
        f"print(sorted({heavy} & set(sys.modules)))"
    ).replace("from hcsmoe_hub import *; ", "import hcsmoe_hub; dir(hcsmoe_hub); ")
    assert run(code) == "[]\n"
