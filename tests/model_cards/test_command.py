"""The command in a card makes the same result again."""

import shlex
from dataclasses import fields, replace
from itertools import product
from typing import Any

import pytest

from hcsmoe_hub.calibration.plan import plan_calibration
from hcsmoe_hub.cli.method_options import MethodFlags
from hcsmoe_hub.errors import PlanError, SourceError
from hcsmoe_hub.model_cards.command import convert_command, evaluate_command
from hcsmoe_hub.model_cards.folder import read_card_data
from hcsmoe_hub.options import (
    Align,
    AlignTo,
    Budget,
    Clustering,
    ConvertOptions,
    Features,
    Layout,
    Linkage,
    Merge,
    MethodOptions,
    Propagate,
    Refit,
    RouterPolicy,
    Saliency,
    Similarity,
)
from hcsmoe_hub.recipe.presets import PRESETS, Preset, given
from hcsmoe_hub.recipe.resolve import resolve

OPTIONS = [
    *PRESETS.values(),
    MethodOptions(preset=Preset.REAP, refit=Refit.BLOCK, refit_passes=3),
    MethodOptions(preset=Preset.REAP, router=RouterPolicy.FIT, refit=Refit.BLOCK, propagate=Propagate.MERGED),
    MethodOptions(preset=Preset.HC_SMOE, refit=Refit.BLOCK, router=RouterPolicy.FIT),
    MethodOptions(preset=Preset.REAP, saliency=Saliency.FREQUENCY, protect=((None, 2), (3, 1)), seed=7),
    MethodOptions(clustering=Clustering.SINGLE_SHOT, similarity=(Similarity.ROUTER_LOGITS, Similarity.WEIGHT)),
    MethodOptions(layout=Layout.MAPPED, budget=Budget.M_SMOE, layers=(0, 1, 3), max_cluster_size=3),
    MethodOptions(merge=Merge.DOMINANT, dominant_weights=(2.0, 0.5), linkage=Linkage.WARD),
    MethodOptions(merge=Merge.ZIPIT, features=Features.WEIGHT, refit=Refit.DOWN),
    MethodOptions(clustering=Clustering.FUZZY),
    MethodOptions(preset=Preset.M_SMOE, align_to=AlignTo.DOMINANT),
    MethodOptions(align=Align.ACTIVATION, align_to=AlignTo.FIRST),
    *(
        MethodOptions(clustering=clustering, align=align, router=router)
        for clustering, align, router in product(
            (Clustering.KMEANS, Clustering.RANDOM), Align, (RouterPolicy.AVERAGE, RouterPolicy.FREQUENCY)
        )
    ),
]

COMMANDS = {
    Preset.HC_REFIT: "",
    Preset.HC_SMOE: "--preset hc-smoe",
    Preset.M_SMOE: "--preset m-smoe",
    Preset.REAP: "--preset reap",
}
CHOICES = {field.name for field in fields(MethodFlags)} | {"seed"}


def facts_of(folder: Any, repo_id: str | None = None) -> Any:
    return read_card_data(folder, repo_id)[0]


def words_of(command: str) -> list[str]:
    return shlex.split(command.replace("\\\n", ""))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_typing_the_command_resolves_to_the_method_in_force(
    make_folder: Any, monkeypatch: pytest.MonkeyPatch, options: MethodOptions
) -> None:
    recipe = resolve(options)
    command = convert_command(facts_of(make_folder({"method": recipe.as_dict()})))
    words = words_of(command)
    assert resolve(parse(words, monkeypatch)) == recipe
    # Nothing is said that the other choices say already.
    for place in [number for number, word in enumerate(words) if word[2:].replace("-", "_") in CHOICES]:
        fewer = parse([*words[:place], *words[place + 2 :]], monkeypatch)
        assert not resolves_to(fewer, recipe), words[place]


@pytest.mark.parametrize(("preset", "words"), COMMANDS.items(), ids=lambda value: str(value)[:20])
def test_a_preset_needs_few_words(make_folder: Any, preset: Preset, words: str) -> None:
    method = resolve(PRESETS[preset]).as_dict()
    sequences = 256 if preset is Preset.HC_REFIT else 128
    command = convert_command(facts_of(make_folder({"method": method, "calibration": {"sequences": sequences}})))
    assert " ".join(words_of(command)).split("--experts 4")[1].strip() == words


def resolves_to(options: MethodOptions, recipe: Any) -> bool:
    try:
        return bool(resolve(options) == recipe)
    except PlanError:
        return False


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The method that the command line reads from a command."""
    return options_of(words, monkeypatch).method


def options_of(words: list[str], monkeypatch: pytest.MonkeyPatch) -> ConvertOptions:
    """The options that the command line reads from a command."""
    from typer.testing import CliRunner

    from hcsmoe_hub.cli import convert
    from hcsmoe_hub.cli.app import app

    seen: list[ConvertOptions] = []
    monkeypatch.setattr(convert, "_convert", lambda source, options, hub, sink: seen.append(options))
    result = CliRunner().invoke(app, words[1:])
    assert result.exit_code == 0, result.stderr
    return seen[0]


def test_command_names_commit_counts_and_calibration(make_folder: Any) -> None:
    changes = {
        "experts": {"per_token_after": 1},
        "calibration": {
            "dataset": "my calib.jsonl",
            "sequences": 8,
            "sequence_length": 128,
            "text_column": "body text",
            "feature_tokens": 512,
        },
        "method": {"seed": 3},
    }
    words = words_of(convert_command(facts_of(make_folder(changes, files=("hcsmoe.png",)))))
    assert words == shlex.split(
        "hcsmoe convert acme/Mixtral-tiny --revision 0123456789abcdef0123456789abcdef01234567 --experts 4 "
        "--experts-per-token 1 --preset hc-smoe --seed 3 --calibration 'my calib.jsonl' --feature-tokens 512 "
        "--samples 8 --sequence-length 128 --text-column 'body text' --figure"
    )


@pytest.mark.parametrize(
    ("limit", "length", "is_named"), [(512, 512, False), (4096, 2048, False), (4096, 512, True), (None, 2048, False)]
)
def test_length_is_named_if_it_is_not_what_the_model_gives(
    make_folder: Any, limit: int | None, length: int, is_named: bool
) -> None:
    changes = {"calibration": {"sequence_length": length}}
    command = convert_command(facts_of(make_folder(changes, config={"max_position_embeddings": limit})))
    assert ("--sequence-length" in command) is is_named


def test_token_ids_need_no_sizes(make_folder: Any) -> None:
    changes = {"calibration": {"dataset": "ids.npy", "sequences": 3, "sequence_length": 99}}
    command = convert_command(facts_of(make_folder(changes)))
    assert " ".join(words_of(command)).endswith("--experts 4 --preset hc-smoe --calibration ids.npy")


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset": "org/dataset", "text_column": "body", "feature_tokens": 64, "sequences": 7},
        {"dataset": "bundled", "sequence_length": 100, "seed": 5},
        {"dataset": "calib.jsonl", "text_column": "messages", "sequence_length": 512, "sequences": 128},
    ],
    ids=lambda changes: changes["dataset"],
)
def test_typing_the_command_observes_the_same_tokens(
    make_folder: Any, monkeypatch: pytest.MonkeyPatch, changes: Any
) -> None:
    folder = make_folder({"calibration": changes, "method": {"seed": changes.get("seed", 42)}})
    facts = facts_of(folder)
    asked = options_of(words_of(convert_command(facts)), monkeypatch).calibration
    limit = facts.config["max_position_embeddings"]
    plan = plan_calibration(
        replace(asked, dataset="bundled"), max_positions=limit, has_tokenizer=True, label="", fits=False
    )
    found = {"dataset": asked.dataset, "feature_tokens": asked.feature_tokens, "seed": plan.seed}
    found |= {name: getattr(plan, name) for name in ("sequences", "sequence_length", "text_column")}
    assert found == {name: facts.report.calibration[name] for name in found}


def test_a_method_of_a_later_version_is_refused(make_folder: Any) -> None:
    with pytest.raises(SourceError, match="the clustering 'quantum', which this version"):
        convert_command(facts_of(make_folder({"method": {"clustering": "quantum"}})))


def test_a_method_that_an_older_report_says_less_of_still_has_a_command(make_folder: Any, report: Any) -> None:
    older = {name: value for name, value in report["method"].items() if name not in ("refit", "budget", "protect")}
    first = {**report, "schema_version": 1, "method": older}
    assert "--experts 4" in convert_command(facts_of(make_folder(base=first)))


def test_measuring_a_folder_needs_no_output_file(make_folder: Any) -> None:
    facts = facts_of(make_folder())
    assert "--output" not in evaluate_command(facts)
    assert evaluate_command(facts).startswith("hcsmoe evaluate mixtral-tiny-hcsmoe-4e")


LIKE = {"repo_id": "me/base-4e", "revision": "0123abcd", "sha256": "0" * 64, "neurons": True}


@pytest.mark.parametrize(
    ("like", "address"),
    [
        (LIKE, "hf://me/base-4e@0123abcd"),
        ({"path": "base 4e", "revision": None, "sha256": "0" * 64, "neurons": False}, "base 4e"),
    ],
)
def test_choices_of_another_result_are_not_repeated_but_named(
    make_folder: Any, monkeypatch: pytest.MonkeyPatch, like: Any, address: str
) -> None:
    recipe = resolve(MethodOptions(refit=Refit.BLOCK, refit_passes=2))
    words = words_of(convert_command(facts_of(make_folder({"method": recipe.as_dict(), "like": like}))))
    found = options_of(words, monkeypatch)
    assert (found.like, found.experts) == (address, None)
    asked = {name: value for name, value in given(found.method).items() if value != ()}
    assert asked == {"refit": "block", "refit_passes": 2, "router": "fit", "propagate": "merged", "seed": 42}
