"""``hcsmoe inspect`` of a result: how it was made, and what became of its experts."""

import json
import shutil

import pytest
from places import ROOT

REFIT = {
    "is_kept": True,
    "error_before": 0.5,
    "error_after": 0.25,
    "fitted_tokens": 100,
    "held_out_tokens": 28,
    "rounds": 1,
    "steps": 0,
}


@pytest.fixture
def copy(converted, tmp_path):
    """A copy of the converted checkpoint; its report may be changed by a function."""
    folder, _ = converted
    target = tmp_path / "result"
    shutil.copytree(folder, target)

    def install(change):
        file = target / "hcsmoe.json"
        document = json.loads(file.read_text())
        change(document)
        file.write_text(json.dumps(document))
        return target

    return install


def test_what_the_conversion_cost_is_shown(run, copy):
    row = {"tokens": 510, "perplexity_before": 10.0, "perplexity_after": 12.0, "ratio": 1.2, "kl": 0.125}
    row |= {"top1_agreement": 0.9}
    domains = {"code": row, "prose": {**row, "ratio": 1.25}}
    figures = {"sequences": 1, "sequence_length": 511, "sha256": "0" * 64, "overall": row, "domains": domains}
    result = run("inspect", copy(lambda document: document.update(measured=figures)))
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "perplexity x1.20 on 510 held-out tokens: prose 1.25, code 1.20" in lines
    assert "same top token 90.0 % of the time; KL divergence from the source 0.125 nats" in lines


@pytest.fixture(scope="module")
def mapped(run, quick, tmp_path_factory):
    """A result whose router rows share experts, with different numbers of them."""
    folder = tmp_path_factory.mktemp("mapped") / "result"
    words = ("--layout", "mapped", "--layers", "1-2", "--clustering", "kmeans")
    return folder, run(*quick, *words, "--output", folder)


def lines_of(result):
    return [" ".join(line.split()) for line in result.stdout.splitlines()]


def test_document_holds_the_report(run, converted):
    folder, _ = converted
    result = run("inspect", folder, "--json")
    assert (result.code, result.stderr) == (0, "")
    assert result.document()["conversion"] == json.loads((folder / "hcsmoe.json").read_text())


def test_checkpoint_of_others_has_no_conversion(run, example):
    assert run("inspect", example, "--json").document()["conversion"] is None


def test_person_sees_method_calibration_and_a_line_per_layer(run, converted, example):
    folder, finished = converted
    lines = lines_of(run("inspect", folder))
    assert any(line.startswith(f"made from {example.name} by hcsmoe ") for line in lines)
    assert any(line.startswith("method hierarchical clustering by expert-output (euclidean, ") for line in lines)
    assert "calibration bundled, 2 x 64 tokens, seed 42" in lines
    title = lines.index("LAYER EXPERTS SILHOUETTE DUNN OUTPUT ERROR TOP-K AGREEMENT DEAD MERGE HEIGHTS")
    rows = [line.split() for line in lines[title + 1 :]]
    assert [row[0] for row in rows] == ["0", "1", "2", "3", "mean"]
    for row, layer in zip(rows, finished.document()["layers"], strict=False):
        assert row[1:4] == ["4", f"{layer['silhouette']:.3f}", f"{layer['dunn']:.3f}"]
        assert row[4] == f"{100 * layer['output_error']:.1f}"
    mean = sum(layer["silhouette"] for layer in finished.document()["layers"]) / 4
    assert rows[-1][2] == f"{mean:.3f}"


def test_one_layer_shows_clusters_shares_and_tree(run, converted):
    folder, finished = converted
    layer = finished.document()["layers"][2]
    lines = lines_of(run("inspect", folder, "--layer", 2))
    assert lines[0] == "layer 2: 8 source experts, 4 left"
    title = lines.index("CLUSTER EXPERTS (* = dominant) USAGE PER EXPERT, %")
    total = sum(layer["usage"])
    for number, line in enumerate(lines[title + 1 : title + 5]):
        members = [expert for expert, label in enumerate(layer["labels"]) if label == number]
        lead = layer["dominant"][number]
        names = ", ".join(f"{expert}*" if expert == lead and len(members) > 1 else f"{expert}" for expert in members)
        share = 100 * sum(layer["usage"][expert] for expert in members) / total
        assert line.startswith(f"{number} {names} {share:.1f} % ")
    assert any("┊ 4 clusters" in line or "4 clusters ┊" in line for line in lines)


def test_one_layer_is_drawn_in_what_the_terminal_can_show(run, converted, monkeypatch):
    folder, _ = converted
    monkeypatch.setattr("hcsmoe_hub.cli.output.Output.is_ascii", True)
    result = run("inspect", folder, "--layer", 0)
    assert result.stdout.replace(str(folder), "").isascii()
    assert "4 clusters" in result.stdout


def test_document_of_one_layer_holds_that_layer_alone(run, converted):
    folder, _ = converted
    (layer,) = run("inspect", folder, "--layer", 3, "--json").document()["conversion"]["layers"]
    assert layer["layer"] == 3


def test_layer_that_is_not_there_is_a_known_failure(run, converted):
    folder, _ = converted
    result = run("inspect", folder, "--layer", 9)
    assert (result.code, result.stdout) == (1, "")
    assert "is not one of its 4 MoE layers: 0, 1, 2, 3." in result.stderr


def test_layer_of_a_checkpoint_without_report_is_a_known_failure(run, example):
    result = run("inspect", example, "--layer", 0)
    assert result.code == 1
    assert "holds no hcsmoe.json" in result.stderr


def test_mapped_result_shows_rows_and_experts_and_how_it_is_loaded(run, mapped):
    folder, finished = mapped
    assert finished.code == 0
    lines = lines_of(finished)
    assert lines[0].startswith("✓ Converted to 4 to 8 experts per layer in ")
    assert f"load: AutoModelForCausalLM.from_pretrained('{folder}', trust_remote_code=True)" in lines
    assert "experts per layer 8 4 to 8 6.0 on average" in lines
    assert "router unchanged tokens are routed as in the source" in lines
    found = run("inspect", folder)
    assert "experts 8 router rows share 4 to 8 experts per layer, 192 neurons each, 2 per token" in lines_of(found)
    assert "LAYER EXPERTS SILHOUETTE DUNN OUTPUT ERROR DEAD MERGE HEIGHTS" in lines_of(found)
    assert "--experts" not in found.everything


def test_parameters_of_a_mapped_result_are_those_of_its_conversion(run, mapped):
    folder, _ = mapped
    document = run("inspect", folder, "--json").document()
    assert document["experts"]["stored_by_layer"] == {"0": 8, "1": 4, "2": 4, "3": 8}
    assert document["parameters"]["total"] == document["conversion"]["parameters"]["after"]
    # All router rows are left, so a token meets what it met in the source: 2 of 8 experts.
    assert document["parameters"]["active"] == 3085440 - 2359296 * 6 // 8


def test_method_without_tree_is_shown_without_one(run, mapped):
    folder, _ = mapped
    result = run("inspect", folder, "--layer", 1)
    assert result.code == 0
    assert "┊" not in result.stdout
    assert "router unchanged" in lines_of(result)


def test_pruned_experts_are_named(run, quick, tmp_path):
    folder = tmp_path / "pruned"
    assert run(*quick, "--method", "prune", "--protect", "*:5", "--output", folder, "--quiet").code == 0
    labels = json.loads((folder / "hcsmoe.json").read_text())["layers"][0]["labels"]
    assert labels[5] >= 0
    pruned = ", ".join(str(expert) for expert, label in enumerate(labels) if label < 0)
    assert f"pruned {pruned}" in lines_of(run("inspect", folder, "--layer", 0))
    assert "method prune by reap, protected *:5" in lines_of(run("inspect", folder))


def test_moved_experts_are_pointed_out(run, copy):
    def move(document):
        layer = document["layers"][0]
        clusters = [[expert for expert, label in enumerate(layer["labels"]) if label == number] for number in range(4)]
        largest = max(range(4), key=lambda number: len(clusters[number]))
        moved = next(expert for expert in clusters[largest] if expert not in layer["dominant"])
        layer["labels"][moved] = (largest + 1) % 4

    result = run("inspect", copy(move), "--layer", 0)
    assert "The size limit moved experts after the tree was cut." in result.stdout


def test_report_of_the_first_version_is_shown_without_what_it_lacks(run, copy):
    def forget(document):
        document["schema_version"] = 1
        document["method"]["correct"] = document["method"].pop("refit")
        for name in ("method", "seed", "dominant", "budget", "protect", "layers", "max_cluster_size"):
            document["method"].pop(name, None)
        for layer in document["layers"]:
            for name in ("experts", "routing_score", "dead_experts", "tree", "silhouette", "dunn", "measured_tokens"):
                del layer[name]
            layer["correction"] = layer.pop("refit")

    folder = copy(forget)
    lines = lines_of(run("inspect", folder))
    row = lines[lines.index("LAYER EXPERTS SILHOUETTE DUNN OUTPUT ERROR TOP-K AGREEMENT DEAD MERGE HEIGHTS") + 1]
    assert row.startswith("0 4 - - ")
    assert run("inspect", folder, "--layer", 0).code == 0


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda document: document.pop("layers"), "layers is missing"),
        (lambda document: document.pop("schema_version"), "schema_version is missing"),
        (lambda document: document.update(method=None), "method is null, not an object"),
        (lambda document: document.update(layers="none"), 'layers is "none", not a list'),
        (
            lambda document: document["layers"][0].update(labels=[0, 1]),
            "].dominant contradict each other",
        ),
        (lambda document: document["layers"][0]["labels"].__setitem__(0, 99), "layers[0].labels names clusters"),
        (lambda document: document["layers"][1].update(dunn="high"), 'layers[1].dunn is "high", not a number'),
        (lambda document: document["layers"][0].update(dunn=float("nan")), "NaN is not a number in JSON"),
        (
            lambda document: document["layers"][0]["tree"].pop(),
            "[0].tree with its 6 merges does not join 8",
        ),
        (
            lambda document: document["layers"][0]["tree"].reverse(),
            "[0].tree with its 7 merges does not join 8",
        ),
        (
            lambda document: document["layers"][0]["tree"][-1].pop(),
            "is not [left, right, height]",
        ),
        (
            lambda document: document["layers"][0]["tree"][0].__setitem__(2, -1.0),
            "has a merge at the height -1.0",
        ),
        (
            lambda document: document["layers"][0]["tree"][0].__setitem__(2, 10**9),
            "7 merges does not join",
        ),
        (
            lambda document: document["layers"][0].update(dominant=[], labels=[-1] * 8),
            "[0].dominant is empty",
        ),
        (lambda document: document["layers"][0].update(output_error=10**400), "layers[0].output_error is "),
        (lambda document: document["layers"][0].update(router=[]), "layers[0].router is [], not an object"),
        (lambda document: document["layers"][0].update(refit={}), "layers[0].refit.is_kept is missing"),
        (
            lambda document: document.update(schema_version=7),
            "schema version 7, and this version of hcsmoe reads 1 to 2",
        ),
    ],
)
def test_damaged_report_is_one_message_and_the_checkpoint_is_shown(run, copy, change, problem):
    folder = copy(change)
    result = run("inspect", folder, "--json")
    assert result.code == 0
    assert result.document()["conversion"] is None
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"Warning: {folder}/hcsmoe.json ")
    assert problem in result.stderr


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"text"', b"\xff\xfe", b"[" * 100_000])
def test_report_that_is_not_a_report_is_one_message(run, copy, content):
    folder = copy(lambda document: None)
    (folder / "hcsmoe.json").write_bytes(content)
    result = run("inspect", folder)
    assert result.code == 0
    assert "experts 4 per layer, 192 neurons each, 2 per token" in lines_of(result)
    assert result.stderr.count("Warning: ") == 1
    refused = run("inspect", folder, "--layer", 0)
    assert (refused.code, refused.stdout) == (1, "")
    assert refused.stderr.startswith("Error: ")


@pytest.mark.parametrize("kind", ["down", "block"])
def test_refit_is_shown_with_its_rounds_and_steps(run, quick, tmp_path, kind):
    folder = tmp_path / "refitted"
    # A fit is kept only where it helps every domain, so little text of many would keep none.
    prose, bundled = tmp_path / "prose.txt", ROOT / "hcsmoe_hub" / "calibration" / "data" / "bundled.jsonl"
    records = map(json.loads, bundled.read_text("utf-8").splitlines())
    prose.write_text("\n".join(record["text"] for record in records if record["domain"] == "prose"), "utf-8")
    finished = run(*quick, "--samples", 24, "--calibration", prose, "--refit", kind, "-o", folder)
    (line,) = (line for line in lines_of(finished) if line.startswith("refit "))
    layers = run("inspect", folder, "--json").document()["conversion"]["layers"]
    refits = [layer["refit"] for layer in layers]
    kept = [refit for refit in refits if refit["is_kept"]]
    assert line.startswith(f"refit {len(kept)}/4 layers, held-out error ")
    assert ("steps" in line) is any(refit["steps"] for refit in kept) is (kind == "block")
    layer = refits.index(kept[0])
    found = next(line for line in lines_of(run("inspect", folder, "--layer", layer)) if line.startswith("refit "))
    before, after, steps = (kept[0][key] for key in ("error_before", "error_after", "steps"))
    errors = f"{100 * before:.1f} % -> {100 * after:.1f} %"
    work = "1 round" if kind == "down" else f"{steps} steps"
    assert found == f"refit held-out error {errors} ({work})"


def test_dropped_refit_is_shown(run, copy):
    def drop(document):
        for layer in document["layers"]:
            layer["refit"] = REFIT | {"is_kept": False, "error_after": 0.5}

    lines = lines_of(run("inspect", copy(drop), "--layer", 1))
    assert "refit dropped: held-out error did not fall" in lines


def test_refit_of_an_early_report_is_shown_without_rounds(run, copy):
    def forget(document):
        document["schema_version"] = 1
        for layer in document["layers"]:
            del layer["refit"]
            layer["correction"] = {"is_kept": True, "error_before": 0.5, "error_after": 0.25}

    lines = lines_of(run("inspect", copy(forget), "--layer", 1))
    assert "refit held-out error 50.0 % -> 25.0 %" in lines


@pytest.mark.parametrize(("experts", "is_fitted"), [(4, True), (8, False)])
def test_fitted_router_is_compared_with_the_rows_that_it_began_with(run, quick, tmp_path, experts, is_fitted):
    folder = tmp_path / "fitted"
    finished = run(*quick, "--experts", experts, "--router", "fit", "-o", folder)
    layers = run("inspect", folder, "--json").document()["conversion"]["layers"]
    fitted = [index for index, layer in enumerate(layers) if layer["router"]["is_fitted"]]
    assert bool(fitted) is is_fitted
    shown = fitted[0] if fitted else 1
    router = layers[shown]["router"]
    line = next(line for line in lines_of(finished) if line.startswith("router fit "))
    detail = next(line for line in lines_of(run("inspect", folder, "--layer", shown)) if line.startswith("router "))
    if is_fitted:
        assert line.startswith(f"router fit {len(fitted)}/4 layers, top-k agreement ")
        before, after = (100 * router[key] for key in ("top_k_agreement_before", "top_k_agreement"))
        assert detail == f"router fitted; top-k agreement {before:.1f} % -> {after:.1f} %"
    else:
        assert line.startswith("router fit 0/4 layers, ")
        assert detail == "router not fitted: there was nothing to fit; top-k agreement 100.0 %"


def test_fit_that_was_dropped_is_named(run, quick, tmp_path, monkeypatch):
    def worse(inputs_TH, targets_TC, rows_CH, bias_C, **_):
        return -rows_CH.float(), bias_C

    monkeypatch.setattr("hcsmoe_hub.layer.router_fit.fit_rows", worse)
    folder = tmp_path / "dropped"
    assert "router fit 0/4 layers, " in " ".join(lines_of(run(*quick, "--router", "fit", "-o", folder)))
    lines = lines_of(run("inspect", folder, "--layer", 1))
    assert any(line.startswith("router not fitted: the fit was no better on held-out text; top-k") for line in lines)
