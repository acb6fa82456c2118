"""The commands that make a result again, and that measure it."""

import shlex
from collections.abc import Iterator
from enum import StrEnum
from typing import Any, get_args, get_type_hints

from hcsmoe_hub.errors import PlanError, SourceError
from hcsmoe_hub.evaluation.options import DEFAULT_WINDOW
from hcsmoe_hub.model_cards.facts import Document, Facts
from hcsmoe_hub.model_cards.markdown import ranges, shell
from hcsmoe_hub.options import (
    DEFAULT_SEQUENCE_LENGTH,
    CalibrationOptions,
    MethodOptions,
    Refit,
    default_samples,
)
from hcsmoe_hub.recipe.presets import Preset, method_options
from hcsmoe_hub.recipe.recipe import Recipe
from hcsmoe_hub.recipe.resolve import flag, resolve
from hcsmoe_hub.report import FIGURE_FILE

TOKEN_IDS = ".npy"
_CALIBRATION = CalibrationOptions()


def convert_command(facts: Facts) -> str:
    """The command that makes the result again: every option in force that is not the default.

    Raises:
        SourceError: If the report names a choice that this program does not know.
    """
    report, base = facts.report, facts.base
    experts = report["experts"]
    words = ["hcsmoe convert", shlex.quote(base.name)]
    if base.revision is not None:
        words.append(f"--revision {base.revision}")
    words.append(f"--experts {experts['after']}")
    if experts["per_token_before"] != experts["per_token_after"]:
        words.append(f"--experts-per-token {experts['per_token_after']}")
    words += [*_method_words(facts.method), *_calibration_words(facts)]
    if FIGURE_FILE in facts.files:
        words.append("--figure")
    return shell(*words)


def evaluate_command(facts: Facts) -> str:
    """The command that measures the result: as it was measured, or as it could be."""
    measures, base = facts.measures, facts.base
    source = base.name if base.revision is None else f"hf://{base.repo_id}@{base.revision}"
    text, choices = (measures.get(name, {}).get("file", {}).get("name") for name in ("perplexity", "choices"))
    if not measures:
        text, choices = "heldout.jsonl", "questions.jsonl"
    words = [f"hcsmoe evaluate {shlex.quote(facts.location)}", f"--base {shlex.quote(source)}"]
    words += [f"--perplexity {shlex.quote(text)}"] if text else []
    words += [f"--choices {shlex.quote(choices)}"] if choices else []
    if "loops" in measures:
        words.append(f"--generate {measures['loops']['model']['overall']['prompts']}")
    if "tasks" in measures:
        words.append(f"--tasks {shlex.quote(','.join(measures['tasks']['settings']['tasks']))}")
    window = measures["perplexity"]["settings"]["window"] if "perplexity" in measures else DEFAULT_WINDOW
    words += [f"--window {window}"] if window != DEFAULT_WINDOW else []
    # A repository is no folder that figures could be kept in.
    words += ["--output results.json"] if facts.repo_id is not None else []
    return shell(*words)


def _method_words(method: Document) -> Iterator[str]:
    """Options of the method, from the preset that needs the fewest: what the others do not decide by themselves."""
    try:
        asked = {name: value for name, value in _values(method).items() if value not in (None, ())}
        recipe = resolve(MethodOptions(**asked))
        found = [given for preset in Preset if (given := _fewest(preset, asked, recipe)) is not None]
        # Of equally many options, those with the name of a method say more.
        shortest = min(
            (_without_preset(given, recipe) for given in found), key=lambda given: (len(given), "preset" not in given)
        )
        for name, value in shortest.items():
            yield f"{flag(name)} {shlex.quote(_text(name, value))}"
    except (PlanError, ValueError, TypeError) as error:
        raise SourceError(
            f"the report names a method that is none: {str(error).rstrip('.')}.", hint="use a newer hcsmoe"
        ) from error


def _fewest(preset: Preset, asked: Document, recipe: Recipe) -> Document | None:
    """The options that a preset needs to become a recipe, itself among them; ``None`` if none make it that."""
    given = {"preset": preset, **asked}
    if not _resolves_to(given, recipe):
        return None
    for name in asked:
        fewer = {key: value for key, value in given.items() if key != name}
        given = fewer if _resolves_to(fewer, recipe) else given
    return given


def _without_preset(given: Document, recipe: Recipe) -> Document:
    """The same without the preset, if the other options lead to it by themselves."""
    fewer = {name: value for name, value in given.items() if name != "preset"}
    return fewer if _resolves_to(fewer, recipe) else given


def _resolves_to(given: Document, recipe: Recipe) -> bool:
    try:
        return resolve(method_options(**given)) == recipe
    except PlanError:
        return False


def _values(method: Document) -> dict[str, Any]:
    """A method of a report as arguments of ``MethodOptions``; what an older report does not name is left open."""
    hints = get_type_hints(MethodOptions)
    known = {name: method[name] for name in hints if method.get(name) is not None}
    return {name: _value(name, hints[name], value) for name, value in known.items()}


def _value(name: str, hint: Any, value: Any) -> Any:
    kinds = [kind for part in (hint, *get_args(hint)) for kind in (part, *get_args(part))]
    enum = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, StrEnum)), None)
    if name == "protect":
        pairs = (item.split(":") for item in value.split(","))
        return tuple((None if layer == "*" else int(layer), int(expert)) for layer, expert in pairs)
    if name == "similarity" and enum is not None:
        return tuple(enum(word) for word in value.split("+"))
    if enum is not None:
        return enum(value)
    return tuple(value) if isinstance(value, list) else value


def _text(name: str, value: Any) -> str:
    """A value as it is typed."""
    match name:
        case "similarity":
            return "+".join(value)
        case "protect":
            return ",".join(f"{'*' if layer is None else layer}:{expert}" for layer, expert in value)
        case "layers":
            return ranges(value)
        case "dominant_weights":
            return "{:g},{:g}".format(*value)
        case _:
            return str(value)


def _calibration_words(facts: Facts) -> Iterator[str]:
    calibration = facts.report["calibration"]
    name = calibration["dataset"]
    if name != _CALIBRATION.dataset:
        yield f"--calibration {shlex.quote(name)}"
    if calibration["feature_tokens"] != _CALIBRATION.feature_tokens:
        yield f"--feature-tokens {calibration['feature_tokens']}"
    if name.endswith(TOKEN_IDS):
        return
    fits = facts.method.get("refit") not in (None, Refit.NONE)
    if calibration["sequences"] != default_samples(calibration["sequence_length"], fits=fits):
        yield f"--samples {calibration['sequences']}"
    if calibration["sequence_length"] != _default_length(facts.config):
        yield f"--sequence-length {calibration['sequence_length']}"
    if calibration["text_column"] is not None:
        yield f"--text-column {shlex.quote(calibration['text_column'])}"


def _default_length(config: Document) -> int:
    """Tokens per sequence that a conversion takes if it is not told."""
    text = config.get("text_config")
    for section in (config, text if isinstance(text, dict) else {}):
        limit = section.get("max_position_embeddings")
        if isinstance(limit, int):
            return min(DEFAULT_SEQUENCE_LENGTH, limit)
    return DEFAULT_SEQUENCE_LENGTH
