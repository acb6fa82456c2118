"""The commands that reproduce a result and that measure it."""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from hcsmoe_hub.calibration.token_ids import holds_token_ids
from hcsmoe_hub.errors import PlanError, SourceError
from hcsmoe_hub.evaluation.cost_options import CostOptions
from hcsmoe_hub.evaluation.measures import CostSettings
from hcsmoe_hub.evaluation.options import DEFAULT_WINDOW
from hcsmoe_hub.machine.units import format_numbers
from hcsmoe_hub.model_cards.card_data import CardData
from hcsmoe_hub.options import (
    CalibrationOptions,
    Dtype,
    FormerRefit,
    MethodOptions,
    Preset,
    Refit,
    default_length,
    default_samples,
)
from hcsmoe_hub.recipe.recipe import AFTERWARDS, Recipe
from hcsmoe_hub.recipe.resolve import resolve
from hcsmoe_hub.report import FIGURE_FILE, LikeRecord

# Longer commands get a line per option.
LINE = 96
_CALIBRATION = CalibrationOptions()


def convert_command(card: CardData) -> str:
    """The command that makes the result again: every option in force that is not the default.

    Raises:
        SourceError: If the report names choices that contradict each other.
    """
    base, experts, like = card.base, card.report.experts, card.report.like
    words = ["hcsmoe convert", shlex.quote(base.name)]
    if base.revision is not None:
        words.append(f"--revision {base.revision}")
    if like is not None:
        words.append(f"--like {shlex.quote(_address(like))}")
    elif experts["before"] != experts["after"] or "width_after" not in experts:
        words.append(f"--experts {experts['after']}")
    if like is None and "width_after" in experts:
        words.append(f"--expert-width {experts['width_after']}")
    if experts["per_token_before"] != experts["per_token_after"]:
        words.append(f"--experts-per-token {experts['per_token_after']}")
    words += [*(_method_words(card.recipe) if like is None else _words_after(card.recipe)), *_calibration_words(card)]
    if card.report.method.get("dtype") == Dtype.BFLOAT16:
        words.append(f"--dtype {Dtype.BFLOAT16}")
    if FIGURE_FILE in card.files:
        words.append("--figure")
    return shell(*words)


def _address(like: LikeRecord) -> str:
    """Another result as the command line takes it: its repository at that commit, or the name of its folder."""
    if "repo_id" not in like:
        return like.get("path", "RESULT")
    return like["repo_id"] if like["revision"] is None else f"hf://{like['repo_id']}@{like['revision']}"


def _words_after(recipe: Recipe) -> Iterator[str]:
    """Options of what follows the choices of experts and neurons, where these are another result's."""
    for name in AFTERWARDS:
        if getattr(recipe, name) is not None:
            yield f"--{name.replace('_', '-')} {getattr(recipe, name)}"


def evaluate_command(card: CardData) -> str:
    """The command that measures the result: as it was measured, or an example."""
    measures, base = card.measures, card.base
    source = base.name if base.revision is None else f"hf://{base.repo_id}@{base.revision}"
    text = measures["perplexity"]["file"]["name"] if "perplexity" in measures else None
    choices = measures["choices"]["file"]["name"] if "choices" in measures else None
    if not card.quality:
        text, choices = "heldout.jsonl", "questions.jsonl"
    words = [f"hcsmoe evaluate {shlex.quote(card.location)}", f"--base {shlex.quote(source)}"]
    words += [f"--perplexity {shlex.quote(text)}"] if text else []
    words += [f"--choices {shlex.quote(choices)}"] if choices else []
    if "loops" in measures:
        words.append(f"--generate {measures['loops']['model']['overall']['prompts']}")
    if "tasks" in measures:
        words.append(f"--tasks {shlex.quote(','.join(measures['tasks']['settings']['tasks']))}")
        words += [f"--limit {limit}"] if (limit := measures["tasks"]["settings"].get("limit")) else []
    window = measures["perplexity"]["settings"]["window"] if "perplexity" in measures else DEFAULT_WINDOW
    words += _cost_words(measures["cost"]["settings"]) if "cost" in measures else []
    words += [f"--window {window}"] if window != DEFAULT_WINDOW else []
    # A repository is not a folder that results could be kept in.
    words += ["--output results.json"] if card.repo_id is not None else []
    return shell(*words)


def _cost_words(settings: CostSettings) -> list[str]:
    """The options of the cost table that are not the default ones."""
    default = CostOptions()
    found = ["--cost"]
    if settings["engine"] != default.engine:
        found.append(f"--engine {settings['engine']}")
    if settings["prompt_tokens"] != default.prompt_length:
        found.append(f"--prompt-tokens {settings['prompt_tokens']}")
    if settings["new_tokens"] != default.new_tokens:
        found.append(f"--new-tokens {settings['new_tokens']}")
    if settings["repetitions"] != default.repetitions:
        found.append(f"--repetitions {settings['repetitions']}")
    if tuple(settings["batch_sizes"]) != default.batch_sizes:
        found.append(f"--batch-sizes {','.join(map(str, settings['batch_sizes']))}")
    return found if settings["timing"] else [*found, "--no-timing"]


def _method_words(recorded: Recipe) -> Iterator[str]:
    """Options of the method, from the preset that needs the fewest: those that the others do not imply."""
    values = {field.name: getattr(recorded, field.name) for field in fields(recorded)}
    asked = {name: value for name, value in values.items() if value not in (None, ())}
    # The command is one of the version that wrote the report; the refit of today stands for its refit until then.
    former = asked["refit"] if isinstance(asked.get("refit"), FormerRefit) else None
    if former is not None:
        asked["refit"] = Refit.BLOCK
    try:
        recipe = resolve(MethodOptions(**({"preset": Preset.HC_SMOE} | asked)))
        found = [given for preset in Preset if (given := _fewest(preset, asked, recipe)) is not None]
        # Of equally many options, those with the name of a method say more.
        shortest = min(
            (_without_preset(given, recipe) for given in found), key=lambda given: (len(given), "preset" not in given)
        )
        if former is not None:
            shortest = {**shortest, "refit": former}
        for name, value in shortest.items():
            yield f"--{name.replace('_', '-')} {shlex.quote(_text(name, value))}"
    except (PlanError, ValueError, TypeError) as error:
        raise SourceError(
            f"the method in the report contradicts itself: {str(error).rstrip('.')}.", hint="use a newer hcsmoe"
        ) from error


def _fewest(preset: Preset, asked: Mapping[str, Any], recipe: Recipe) -> Mapping[str, Any] | None:
    """A preset and the options that turn it into a recipe; ``None`` if nothing does."""
    given = {"preset": preset, **asked}
    if not _resolves_to(given, recipe):
        return None
    for name in asked:
        fewer = {key: value for key, value in given.items() if key != name}
        given = fewer if _resolves_to(fewer, recipe) else given
    return given


def _without_preset(given: Mapping[str, Any], recipe: Recipe) -> Mapping[str, Any]:
    """The same without the preset, if the other options imply it."""
    fewer = {name: value for name, value in given.items() if name != "preset"}
    return fewer if _resolves_to(fewer, recipe) else given


def _resolves_to(given: Mapping[str, Any], recipe: Recipe) -> bool:
    try:
        return resolve(MethodOptions(**given)) == recipe
    except PlanError:
        return False


def _text(name: str, value: Any) -> str:
    """A value as it is typed."""
    match name:
        case "similarity":
            return "+".join(value)
        case "protect":
            return ",".join(f"{'*' if layer is None else layer}:{expert}" for layer, expert in value)
        case "layers":
            return format_numbers(value)
        case "dominant_weights":
            return "{:g},{:g}".format(*value)
        case _:
            return str(value)


def _calibration_words(card: CardData) -> Iterator[str]:
    calibration = card.report.calibration
    name = calibration["dataset"]
    if name != _CALIBRATION.dataset:
        yield f"--calibration {shlex.quote(name)}"
    if calibration["feature_tokens"] != _CALIBRATION.feature_tokens:
        yield f"--feature-tokens {calibration['feature_tokens']}"
    if calibration.get("is_split"):
        yield f"--source-length {calibration['source_length']}"
    if holds_token_ids(name):
        return
    fits = card.recipe.refit not in (None, Refit.NONE)
    if calibration["sequences"] != default_samples(calibration["sequence_length"], fits=fits):
        yield f"--samples {calibration['sequences']}"
    if calibration["sequence_length"] != _default_length(card.config, is_split="source_length" in calibration):
        yield f"--sequence-length {calibration['sequence_length']}"
    if calibration["text_column"] is not None:
        yield f"--text-column {shlex.quote(calibration['text_column'])}"


def _default_length(config: Mapping[str, Any], *, is_split: bool) -> int:
    """Tokens per sequence of a conversion that names none; both parts where an encoder reads one of them."""
    text = config.get("text_config")
    for section in (config, text if isinstance(text, dict) else {}):
        limit = section.get("max_position_embeddings")
        if isinstance(limit, int):
            return default_length(limit, is_encoder_decoder=is_split)
    return default_length(None, is_encoder_decoder=is_split)


def shell(*words: str) -> str:
    """A command; one option per line if it is long.

    Args:
        words: The command and its arguments, then options, each with its value: ``--experts 4``.
    """
    line = " ".join(words)
    if len(line) <= LINE:
        return line
    head = [word for word in words if not word.startswith("-")]
    options = [word for word in words if word.startswith("-")]
    return " \\\n  ".join((" ".join(head), *options))
