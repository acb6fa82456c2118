"""Modelling files that results bring along: a module of this package, and one class that builds on it."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

from hcsmoe_hub.checkpoint import modeling_hcsmoe, modeling_hcsmoe_factored
from hcsmoe_hub.checkpoint.auto_class import auto_class
from hcsmoe_hub.model.model_class import model_class
from hcsmoe_hub.model.source_model import SourceModel
from hcsmoe_hub.options import Layout

_APPENDED = '''

from transformers import {base}  # noqa: E402


class {name}({mixin}, {base}):
    """``{base}`` whose {trait}."""
'''


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnCode:
    """The modelling file of a layout.

    Attributes:
        file: Its name, in this package and in a result.
        prefix: What the name of its class begins with.
        mixin: The class of the module that goes before the one of transformers.
        trait: What is different about the class, in words that continue "whose".
    """

    file: str
    prefix: str
    mixin: str
    trait: str

    def class_name(self, model: SourceModel) -> str:
        """Name of the class in the file, also for a model that already is of this layout."""
        return self.prefix + model_class(model.skeleton.config).__name__

    def auto_map(self, model: SourceModel) -> dict[str, str]:
        """The entry ``auto_map`` of ``config.json``: which class of which file loads the checkpoint."""
        loader = auto_class(model.source.config["model_type"]).name
        return {loader: f"{self.file.removesuffix('.py')}.{self.class_name(model)}"}

    def source(self, model: SourceModel) -> str:
        """Text of the file that belongs into a result."""
        module = files("hcsmoe_hub.checkpoint").joinpath(self.file).read_text("utf-8")
        base, name = model_class(model.skeleton.config).__name__, self.class_name(model)
        return module + _APPENDED.format(base=base, name=name, mixin=self.mixin, trait=self.trait)


OWN_CODE: Mapping[Layout, OwnCode] = {
    Layout.MAPPED: OwnCode(
        file="modeling_hcsmoe.py",
        prefix=modeling_hcsmoe.CLASS_PREFIX,
        mixin=modeling_hcsmoe.MappedExperts.__name__,
        trait="router rows share experts",
    ),
    Layout.FACTORED: OwnCode(
        file="modeling_hcsmoe_factored.py",
        prefix=modeling_hcsmoe_factored.CLASS_PREFIX,
        mixin=modeling_hcsmoe_factored.FactoredExperts.__name__,
        trait="experts are stored as factors and a few whole rows",
    ),
}
