"""Prose: true for every method, layout and kind of change."""

from pathlib import Path
from typing import Any

import pytest

from hcsmoe_hub import options
from hcsmoe_hub.model_cards import write_card
from hcsmoe_hub.options import Layout, MethodOptions, RouterPolicy
from hcsmoe_hub.recipe.resolve import resolve

ALL = [0, 1, 2, 3, 4, 5, 6, 7]
PRUNED = resolve(MethodOptions(preset=options.Preset.REAP)).as_dict()


def card(folder: Path) -> str:
    return write_card(folder).path.read_text("utf-8")


def paragraph(folder: Path) -> str:
    """The first one, below the title."""
    return card(folder).split("\n\n# ")[1].split("\n\n")[1]


def relabelled(report: Any, *labels: list[int]) -> Any:
    layers = []
    for layer, row in zip(report["layers"], labels, strict=True):
        dominant = [row.index(cluster) for cluster in range(max(row) + 1)]
        layers.append({**layer, "labels": row, "dominant": dominant, "experts": len(dominant)})
    return {**report, "layers": layers}


@pytest.mark.parametrize("method", ["merge", "prune"])
def test_a_conversion_that_keeps_all_experts_claims_nothing(make_folder: Any, report: Any, method: str) -> None:
    same = relabelled(report, ALL, ALL, ALL, ALL)
    changes = {"experts": {"after": 8}, "method": PRUNED if method == "prune" else {}}
    folder = make_folder(changes, base=same)
    text = card(folder)
    assert "with all 8 experts of every MoE layer: nothing was" in text
    assert not any(word in text for word in ("hierarchical", "arxiv.org", "expert-merging", "expert-pruning", "bibtex"))


def test_layers_with_different_numbers_are_described_as_such(make_folder: Any, report: Any) -> None:
    few, many = [0, 0, 0, 0, 1, 1, 1, 1], [0, 1, 2, 3, 4, 5, 6, 6]
    folder = make_folder(
        {"method": resolve(MethodOptions(layout=Layout.MAPPED, budget=options.Budget.FREQUENCY)).as_dict()},
        base=relabelled(report, few, many, few, many),
    )
    text = paragraph(folder)
    assert (
        "of each of its 4 MoE layers merged into 2 to 7 (4.5 on average), behind a router that keeps its 8 rows" in text
    )
    assert "among the globally most used" in text


def test_layers_that_were_left_alone_are_not_counted(make_folder: Any, report: Any) -> None:
    half = [0, 0, 1, 1, 2, 2, 3, 3]
    folder = make_folder(
        {"method": resolve(MethodOptions(layout=Layout.FULL, layers=(1, 2))).as_dict()},
        base=relabelled(report, ALL, half, half, ALL),
    )
    text = card(folder)
    assert "with the 8 experts of 2 of its 4 MoE layers merged into 4 and stored 8 times" in text
    assert "| Experts per MoE layer | 8 | 8, 4 to 8 (6 on average) of them distinct |" in text
    assert "it saves nothing" in text


def test_a_change_of_the_active_experts_is_stated(make_folder: Any) -> None:
    folder = make_folder({"experts": {"per_token_after": 4}})
    text = card(folder)
    assert "4 experts are active per token instead of 2." in text
    assert "| Active experts per token | 2 | 4 |" in text
    assert "All 4 experts are active for every token" in text


@pytest.mark.parametrize(
    ("chosen", "cited"),
    [
        (MethodOptions(preset=options.Preset.HC_SMOE), ["2410.08589"]),
        (
            MethodOptions(clustering=options.Clustering.SINGLE_SHOT, align=options.Align.WEIGHT),
            ["2310.01334"],
        ),
        (MethodOptions(merge=options.Merge.ZIPIT), ["2410.08589", "2305.03053"]),
        (MethodOptions(preset=options.Preset.REAP), ["2510.13999"]),
        (MethodOptions(preset=options.Preset.REAP, saliency=options.Saliency.FREQUENCY), []),
        (MethodOptions(clustering=options.Clustering.RANDOM), []),
    ],
    ids=str,
)
def test_papers_are_cited_where_their_method_is_used(make_folder: Any, chosen: MethodOptions, cited: list[str]) -> None:
    text = card(make_folder({"method": resolve(chosen).as_dict()}))
    papers = ("2410.08589", "2310.01334", "2305.03053", "2510.13999")
    assert [number for number in papers if number in text] == [number for number in papers if number in cited]


@pytest.mark.parametrize("recipe", [MethodOptions(clustering=kind) for kind in options.Clustering], ids=str)
def test_no_placeholder_is_left_open(make_folder: Any, recipe: MethodOptions) -> None:
    text = paragraph(make_folder({"method": resolve(recipe).as_dict()}))
    assert not any(sign in text for sign in ("{", "}", "None", "  "))


def refitted(report: Any, *refits: Any) -> Any:
    layers = [{**layer, "refit": found} for layer, found in zip(report["layers"], refits, strict=True)]
    return {**report, "layers": layers}


def refit(*, before: float, after: float, rounds: int, steps: int = 0) -> Any:
    fell = after < before
    errors = {"is_kept": fell, "error_before": before, "error_after": after}
    return {**errors, "fitted_tokens": 896, "held_out_tokens": 128, "rounds": rounds, "steps": steps}


def former_method(preset: options.Preset, refit: options.FormerRefit) -> dict[str, Any]:
    """The method of a report that an earlier version wrote."""
    method = resolve(MethodOptions(preset=preset)).as_dict() | {"refit": str(refit)}
    del method["refit_passes"]
    return method


def test_a_refit_is_described_with_its_work_and_its_errors(make_folder: Any, report: Any) -> None:
    kept = [refit(before=0.4, after=0.3, rounds=rounds) for rounds in (1, 7, 3)]
    method = former_method(options.Preset.HC_SMOE, options.FormerRefit.EXPERTS)
    folder = make_folder({"method": method}, base=refitted(report, *kept, refit(before=0.4, after=0.4, rounds=0)))
    text = card(folder)
    assert "kept in 3 of 4 layers, after 1 to 7 rounds of least squares." in text
    assert "fell from 40.0 % to 30.0 % of its norm (mean over 3 layers). Elsewhere the refit did not" in text
    assert "All matrices of the experts in 3 of 4 layers were then refitted" in text
    assert "| 40.0 % to 30.0 % |" in text
    assert "| 40.0 %, dropped |" in text


def test_one_round_fits_the_down_projections_alone(make_folder: Any, report: Any) -> None:
    method = former_method(options.Preset.HC_SMOE, options.FormerRefit.EXPERTS)
    once = refitted(report, *[refit(before=0.4, after=0.3, rounds=1)] * 4)
    assert "The down projections of the experts were then refitted" in paragraph(
        make_folder({"method": method}, base=once)
    )


def test_a_refit_that_was_dropped_everywhere_is_not_claimed(make_folder: Any, report: Any) -> None:
    dropped = [refit(before=0.4, after=0.4, rounds=0)] * 4
    method = former_method(options.Preset.REAP, options.FormerRefit.EXPERTS)
    text = card(make_folder({"method": method}, base=refitted(report, *dropped)))
    assert "tried in 4 layers and dropped" in text
    assert "fitted to" not in text
    assert "No training was done." in text


def test_gradient_descent_within_layers_is_not_passed_over(make_folder: Any, report: Any) -> None:
    method = former_method(options.Preset.HC_SMOE, options.FormerRefit.BLOCKS)
    kept = [refit(before=0.4, after=0.3, rounds=2, steps=400)] * 4
    folder = make_folder({"method": method}, base=refitted(report, *kept))
    assert "after 2 rounds of least squares and 400 steps of gradient descent." in card(folder)
    (folder / "README.md").unlink()
    text = paragraph(folder)
    assert "by gradient descent, one layer at a time. All other weights" in text
    assert text.endswith("The model as a whole was not trained.")
    assert "No training was done" not in text


def test_a_fitted_router_is_described_with_what_it_changed(make_folder: Any, report: Any) -> None:
    fitted = {"policy": "fit", "top_k_agreement": 0.9, "is_fitted": True, "top_k_agreement_before": 0.8}
    dropped = {**fitted, "is_fitted": False, "top_k_agreement": 0.8}
    layers = [
        {**layer, "router": router} for layer, router in zip(report["layers"], [fitted] * 3 + [dropped], strict=True)
    ]
    method = resolve(MethodOptions(preset=options.Preset.HC_SMOE, router=RouterPolicy.FIT)).as_dict()
    text = card(make_folder({"method": method}, base={**report, "layers": layers}))
    assert "They are used in 3 of 4 layers; elsewhere" in text
    assert "agreement rose from 80.0 % to 90.0 %" in text
    assert "87.5 % of the base router's choices are kept" in text


def test_warnings_are_not_endless(make_folder: Any) -> None:
    text = card(make_folder({"warnings": [f"layer {number}: x" for number in range(20)]}))
    assert "- layer 9: x\n- and 10 more in `hcsmoe.json`" in text
    assert "layer 10: x" not in text


def trained(*, kept: bool) -> Any:
    domains = [
        {"domain": "prose", "kl_before": 0.4237, "kl_after": 0.3764 if kept else 0.4237},
        {"domain": "code", "kl_before": 0.25, "kl_after": 0.2 if kept else 0.25},
    ]
    counts = {"fitted_tokens": 114688, "visited_tokens": 229376, "held_out_tokens": 8192}
    return {"is_kept": kept, "steps": 224 if kept else 0, "rate": 0.003, **counts, "domains": domains, "seconds": 30.0}


@pytest.mark.parametrize("kept", [True, False])
def test_a_card_says_that_the_whole_model_was_trained_if_it_was(make_folder: Any, report: Any, kept: bool) -> None:
    method = resolve(MethodOptions(preset=options.Preset.HC_SMOE, refit=options.Refit.MODEL)).as_dict()
    layers = refitted(report, *[refit(before=0.4, after=0.3, rounds=2, steps=400)] * 4)
    text = paragraph(make_folder({"method": method, "refit_model": trained(kept=kept)}, base=layers))
    claim = (
        "Then the routers, the experts and the norms of the whole reduced model were trained on the base model's "
        "logits, with 224 steps of gradient descent on 114.69 K tokens of the calibration text. On held-out "
        "calibration text, the KL divergence from the base model fell from 0.424 to 0.376 nats per token in prose and "
        "from 0.25 to 0.2 nats per token in code."
    )
    assert (claim in text) is kept
    assert ("The model as a whole was not trained." in text) is not kept
    assert "All other weights are the base model's." in text


LIKE = {"repo_id": "me/base-4e", "revision": "0123abcd", "sha256": "0" * 64, "neurons": True}


def test_a_card_says_whose_choices_were_applied(make_folder: Any) -> None:
    text = card(make_folder({"like": LIKE}))
    assert (
        "These choices, down to single neurons, were made for "
        "[me/base-4e](https://huggingface.co/me/base-4e/tree/0123abcd), and applied to this model; all weights come "
        "from this model and its own calibration text."
    ) in text
    local = {"path": "base-4e", "revision": None, "sha256": "0" * 64, "neurons": False}
    assert "These choices were made for `base-4e`, and applied" in card(make_folder({"like": local}, name="local"))
    assert "These choices" not in card(make_folder(name="own"))


def test_a_card_mentions_the_file_of_neurons_where_there_is_one(make_folder: Any) -> None:
    record = {"before": 14336, "after": 14336, "sha256": "0" * 64, "bytes": 5_000_000}
    listed = card(make_folder({"neurons": record}))
    assert (
        "holds every choice in force and the clusters of every layer, [`hcsmoe-neurons.npz`](hcsmoe-neurons.npz) "
        "(5.0 MB, which no program loads) the source of each of their neurons."
    ) in listed
    assert "hcsmoe-neurons" not in card(make_folder(name="without"))
