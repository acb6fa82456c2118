"""What the library uses of transformers beyond its public interface is in one file, and exists in the installed one."""

import ast
import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import transformers
from places import ROOT
from transformers import PreTrainedConfig, PreTrainedModel

from hcsmoe_hub.model import stacked_experts
from hcsmoe_hub.model.expert_kinds import KINDS
from hcsmoe_hub.model.stacked_experts import _BLOCKS, _SHARING

SEAM = ROOT / "hcsmoe_hub/model/transformers_seam.py"
# The file that travels with checkpoints has to stand alone.
ALONE = ROOT / "hcsmoe_hub/checkpoint/modeling_hcsmoe.py"
# Set by transformers while it loads a model, and gone from the class before that.
WHILE_LOADING = "_weight_conversions"
# Set by transformers on every tensor that it has loaded.
LOADED = "_is_hf_initialized"
# Added to the class of fused experts by a decorator.
OF_EXPERTS = "_apply_gate"


def private_names(file: Path) -> set[str]:
    """Attributes with an underscore in front that a file takes from other objects, by name or by string."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                pass
            case ast.Attribute(attr=name) | ast.Constant(value=str(name)):
                if name.startswith("_") and not name.startswith("__") and name.isidentifier():
                    found.add(name)
    return found


def imported(file: Path) -> Iterator[tuple[str, str]]:
    """Modules of transformers that a file imports from, and the names."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "transformers":
            yield from ((str(node.module), alias.name) for alias in node.names)


def library() -> list[Path]:
    """Every file of the library but the two that may name private parts of transformers."""
    return [file for file in sorted((ROOT / "hcsmoe_hub").rglob("*.py")) if file not in (SEAM, ALONE)]


def missing(name: str) -> str:
    """What to say of a name that is gone."""
    return (
        f"transformers {transformers.__version__} has no {name}, which hcsmoe_hub/model/transformers_seam.py uses: "
        "find what took its place, and change the functions of that file."
    )


@pytest.mark.parametrize(("module", "name"), sorted(imported(SEAM)))
def test_what_the_seam_imports_is_in_the_installed_transformers(module: str, name: str) -> None:
    assert hasattr(import_module(module), name), missing(f"{module}.{name}")


@pytest.mark.parametrize("name", sorted(private_names(SEAM) - {WHILE_LOADING, LOADED, OF_EXPERTS}))
def test_private_attributes_that_the_seam_uses_are_in_the_installed_transformers(name: str) -> None:
    owners = (PreTrainedModel, PreTrainedConfig, import_module("transformers.core_model_loading").WeightTransform)
    assert any(hasattr(owner, name) for owner in owners), missing(name)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        (WHILE_LOADING, "transformers.core_model_loading"),
        (LOADED, "transformers.core_model_loading"),
        (OF_EXPERTS, "transformers.integrations.moe"),
        ("HF_DEACTIVATE_ASYNC_LOAD", "transformers.core_model_loading"),
    ],
)
def test_names_that_the_seam_shares_with_a_module_of_transformers_are_in_its_source(name: str, module: str) -> None:
    assert name in SEAM.read_text("utf-8")
    assert name in inspect.getsource(import_module(module)), missing(name)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_classes_of_experts_that_are_known_by_name_exist(name: str) -> None:
    places = {"DbrxExperts": "dbrx", "Llama4TextExperts": "llama4"}
    if name not in places:
        assert hasattr(stacked_experts, name)
        return
    module = import_module(f"transformers.models.{places[name]}.modeling_{places[name]}")
    assert hasattr(module, name), missing(name)


@pytest.mark.parametrize("name", [*sorted(_BLOCKS), _SHARING])
def test_classes_whose_experts_are_stacked_are_in_the_installed_transformers(name: str) -> None:
    model_type = "nllb_moe" if name.startswith("Nllb") else "switch_transformers"
    module = import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    assert hasattr(module, name), missing(name)


def test_no_other_file_names_a_private_attribute_of_transformers() -> None:
    private = private_names(SEAM)
    # Code that results carry runs without this package.
    own = (file for file in library() if not file.name.startswith("modeling_"))
    found = {file.relative_to(ROOT).as_posix(): private & private_names(file) for file in own}
    assert {name: names for name, names in found.items() if names} == {}


def test_no_other_file_imports_from_the_inside_of_transformers() -> None:
    found = {
        (file.relative_to(ROOT).as_posix(), module)
        for file in library()
        for module, _ in imported(file)
        if module != "transformers" and not module.startswith("transformers.utils")
    }
    assert found == set()
