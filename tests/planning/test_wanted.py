"""Which statistics a conversion collects: those that something in force needs."""

from pathlib import Path

import pytest
from tiny_models import build, options

from hcsmoe_hub import MethodOptions, plan
from hcsmoe_hub.observation.wanted import Wanted
from hcsmoe_hub.options import Align, Method, Preset, Saliency, Similarity

NOTHING = Wanted(outputs=False, products=False, logits=False, sums=False, sample=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wanted") / "model")


@pytest.mark.parametrize(
    ("method", "needed"),
    [
        pytest.param(MethodOptions(preset=Preset.REAP), set(), id="reap"),
        pytest.param(MethodOptions(), set(), id="default"),
        pytest.param(MethodOptions(preset=Preset.HC_SMOE), {"outputs"}, id="hc-smoe"),
        pytest.param(MethodOptions(preset=Preset.M_SMOE), {"logits"}, id="m-smoe"),
        pytest.param(
            MethodOptions(preset=Preset.HC_SMOE, align=Align.ACTIVATION),
            {"outputs", "sample"},
            id="hc-smoe-aligned",
        ),
        pytest.param(
            MethodOptions(preset=Preset.HC_SMOE, similarity=(Similarity.ROUTER_LOGITS,)),
            {"logits"},
            id="hc-smoe-by-logits",
        ),
        pytest.param(MethodOptions(method=Method.PRUNE, saliency=Saliency.GRAM), {"products"}, id="gram"),
        pytest.param(MethodOptions(method=Method.PRUNE, saliency=Saliency.MAN), {"sums"}, id="man"),
        pytest.param(MethodOptions(method=Method.PRUNE, saliency=Saliency.TOTAL_MASS), {"sums"}, id="total-mass"),
        pytest.param(
            MethodOptions(method=Method.PRUNE, saliency=Saliency.RECONSTRUCTION),
            {"sample"},
            id="reconstruction",
        ),
    ],
)
def test_a_conversion_observes_only_what_its_method_needs(
    source: Path, method: MethodOptions, needed: set[str]
) -> None:
    found = plan(source, options(source, 4, method=method)).wanted
    assert {name for name in Wanted.__slots__ if getattr(found, name)} == needed
