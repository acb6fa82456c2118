"""Results whose routers keep their rows answer as the merged models of the published code of HC-SMoE do.

``tests/golden/README.md`` says where the figures come from.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from places import GOLDEN
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, dynamic_module_utils
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from hcsmoe_hub import CalibrationOptions, ConvertOptions, MethodOptions, convert
from hcsmoe_hub.options import Layout, Merge

# All calibration tokens: the reference matches neurons on every token that is routed to a member of the cluster.
TOKENS = 4096
TOLERANCE = 1e-4
WORDS = slice(None, None, 4)
MERGED = [(Merge.FREQUENCY, 4), (Merge.AVERAGE, 4), (Merge.FREQUENCY, 2), (Merge.AVERAGE, 2), (Merge.ZIPIT, 4)]

Answer = Callable[[Merge, int, Layout], Tensor]


@pytest.fixture(scope="module", autouse=True)
def own_modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps copied modelling files out of the user's cache, and their classes out of the auto class."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", list(sys.path))
        registered = dict(MODEL_FOR_CAUSAL_LM_MAPPING._extra_content)
        patch.setattr(MODEL_FOR_CAUSAL_LM_MAPPING, "_extra_content", registered)
        yield


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    """The prompts, and the logits of the reference."""
    return load_file(GOLDEN / "logits.safetensors")


def logits(folder: Path, prompts: Tensor, *, trust_remote_code: bool = False) -> Tensor:
    """Logits ``[B, S, words]`` of a checkpoint loaded with plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.no_grad():
        return model.eval()(prompts).logits[..., WORDS]


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory, reference: dict[str, Tensor]) -> Answer:
    """Logits of the converted golden model; the first conversion collects the statistics of all."""
    folder = tmp_path_factory.mktemp("golden")
    options = ConvertOptions(
        experts=4,
        calibration=CalibrationOptions(dataset=str(GOLDEN / "calib.npy"), feature_tokens=TOKENS),
        statistics=folder / "statistics",
        device="cpu",
    )

    @cache
    def run(merge: Merge, experts: int, layout: Layout) -> Tensor:
        output = folder / f"{merge}-{experts}-{layout}"
        method = MethodOptions(merge=merge, layout=layout)
        convert(GOLDEN / "mixtral", replace(options, experts=experts, method=method, output=output))
        return logits(output, reference["prompts"], trust_remote_code=layout is Layout.MAPPED)

    return run


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """Of any two logits, in units of the largest one."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def test_the_source_gives_the_logits_of_the_reference(reference: dict[str, Tensor]) -> None:
    assert largest_difference(logits(GOLDEN / "mixtral", reference["prompts"]), reference["source"]) < TOLERANCE / 10


@pytest.mark.parametrize(("merge", "experts"), MERGED)
@pytest.mark.parametrize("layout", [Layout.FULL, Layout.MAPPED])
def test_the_logits_are_those_of_the_merged_model_of_the_reference(
    answer: Answer, reference: dict[str, Tensor], merge: Merge, experts: int, layout: Layout
) -> None:
    found = answer(merge, experts, layout)
    assert largest_difference(found, reference[f"{merge}.{experts}"]) < TOLERANCE


@pytest.mark.parametrize(("merge", "experts"), MERGED)
def test_both_layouts_give_the_same_logits(answer: Answer, merge: Merge, experts: int) -> None:
    full, mapped = answer(merge, experts, Layout.FULL), answer(merge, experts, Layout.MAPPED)
    assert largest_difference(mapped, full) < 1e-5


def test_the_reduced_layout_is_another_model(answer: Answer, reference: dict[str, Tensor]) -> None:
    # Otherwise the comparisons above would say nothing about the router.
    found = answer(Merge.FREQUENCY, 4, Layout.REDUCED)
    assert largest_difference(found, reference["frequency.4"]) > 100 * TOLERANCE


def test_the_reference_distinguishes_the_merges(reference: dict[str, Tensor]) -> None:
    names = ["source", *(f"{merge}.{experts}" for merge, experts in MERGED)]
    for number, one in enumerate(names):
        for other in names[:number]:
            assert largest_difference(reference[one], reference[other]) > 10 * TOLERANCE, (one, other)
