"""A recipe as reports record it, and what it says of single layers."""

from enum import StrEnum

from hcsmoe_hub.options import Layout, Merge, MethodOptions, Similarity
from hcsmoe_hub.recipe.resolve import resolve


def test_a_recipe_is_written_in_the_words_of_the_command_line() -> None:
    recipe = resolve(
        MethodOptions(
            similarity=(Similarity.EXPERT_OUTPUT, Similarity.WEIGHT),
            protect=((None, 3), (2, 1)),
            layers=(1, 2),
            layout=Layout.FULL,
            merge=Merge.DOMINANT,
            dominant_weights=(2.0, 1.0),
        )
    )
    found = {name: value for name, value in recipe.as_dict().items() if value is not None}
    assert found == {
        "method": "merge",
        "similarity": "expert-output+weight",
        "distance": "euclidean",
        "clustering": "hierarchical",
        "linkage": "average",
        "dominant": "center",
        "budget": "uniform",
        "protect": "*:3,2:1",
        "layers": (1, 2),
        "merge": "dominant",
        "dominant_weights": (2.0, 1.0),
        "align": "none",
        "layout": "full",
        "seed": 42,
    }
    assert all(type(value) is not StrEnum and not isinstance(value, StrEnum) for value in found.values())


def test_protected_experts_are_those_of_a_layer_and_of_all() -> None:
    recipe = resolve(MethodOptions(protect=((None, 3), (2, 1), (2, 3), (4, 5))))
    assert {layer: set(recipe.protected(layer)) for layer in (0, 2, 4)} == {0: {3}, 2: {1, 3}, 4: {3, 5}}
