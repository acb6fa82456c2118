"""Which expert a stored name belongs to."""

from hcsmoe_hub.layer.stored_experts import expert_places


def test_the_number_that_varies_most_is_the_expert() -> None:
    names = [f"model.layers.7.mlp.experts.{expert}.w{part}.weight" for expert in range(12) for part in (1, 2)]
    places = expert_places(names)
    assert places["model.layers.7.mlp.experts.11.w2.weight"] == ("model.layers.7.mlp.experts.{}.w2.weight", 11)
    assert len(places) == 24


def test_a_layer_with_the_number_of_an_expert_is_not_mistaken_for_one() -> None:
    names = [f"model.layers.3.experts.{expert}.w.weight" for expert in range(4)]
    assert expert_places(names)[names[3]] == ("model.layers.3.experts.{}.w.weight", 3)


def test_fused_experts_have_no_numbers() -> None:
    assert expert_places(["model.layers.3.mlp.experts.gate_up_proj", "model.layers.3.mlp.experts.down_proj"]) == {}
