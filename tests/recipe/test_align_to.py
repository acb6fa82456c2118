"""Which expert others are aligned to, and what needs a dominant expert then."""

from hcsmoe_hub.options import Align, AlignTo, Clustering, Dominant, MethodOptions, Preset, RouterPolicy
from hcsmoe_hub.recipe.resolve import resolve

AVERAGED = {"preset": Preset.HC_SMOE, "align": Align.WEIGHT, "router": RouterPolicy.AVERAGE}


def test_experts_are_aligned_to_the_dominant_one_unless_the_first_is_asked_for() -> None:
    assert resolve(MethodOptions(align=Align.WEIGHT)).align_to is AlignTo.DOMINANT
    assert resolve(MethodOptions(align=Align.WEIGHT, align_to=AlignTo.FIRST)).align_to is AlignTo.FIRST
    assert resolve(MethodOptions(preset=Preset.HC_SMOE)).align_to is None


def test_m_smoe_aligns_to_the_first_expert_as_its_paper_does_and_drops_that_without_alignment() -> None:
    assert resolve(MethodOptions(preset=Preset.M_SMOE)).align_to is AlignTo.FIRST
    assert resolve(MethodOptions(preset=Preset.M_SMOE, compress="32,90%")).align_to is AlignTo.FIRST
    assert resolve(MethodOptions(preset=Preset.M_SMOE, align=Align.ACTIVATION)).align_to is AlignTo.FIRST
    assert resolve(MethodOptions(preset=Preset.M_SMOE, align=Align.NONE)).align_to is None
    assert resolve(MethodOptions(preset=Preset.M_SMOE, align_to=AlignTo.DOMINANT)).align_to is AlignTo.DOMINANT


def test_the_first_expert_of_a_layer_needs_no_dominant_one() -> None:
    assert resolve(MethodOptions(**AVERAGED)).dominant is Dominant.FREQUENCY
    for clustering in (Clustering.HIERARCHICAL, Clustering.RANDOM):
        to_first = MethodOptions(**AVERAGED, clustering=clustering, align_to=AlignTo.FIRST)
        assert resolve(to_first).dominant is None
