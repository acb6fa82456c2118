"""The choices of another conversion, read from its result and checked against the model that they are applied to.

What is taken are the number of experts, the method, the experts that are kept or merged, and the neurons that merged
experts are made of. Everything that is computed from them comes from the model's own weights and calibration text.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from hcsmoe_hub.checkpoint.result_formats import round_width
from hcsmoe_hub.checkpoint.source import LocalSource, Source
from hcsmoe_hub.checkpoint.tensors import parse_config
from hcsmoe_hub.errors import PlanError, SourceError
from hcsmoe_hub.hub.open import open_source
from hcsmoe_hub.methods.merging import NeuronOrigins
from hcsmoe_hub.options import Clustering, ConvertOptions, FormerRefit, Method, MethodOptions, Preset, Refit
from hcsmoe_hub.recipe.presets import given
from hcsmoe_hub.recipe.read import read_recipe
from hcsmoe_hub.recipe.recipe import AFTERWARDS, Recipe
from hcsmoe_hub.recipe.resolve import resolve
from hcsmoe_hub.report import NEURONS_FILE, REPORT_FILE, ConversionReport, LayerReport, LikeRecord
from hcsmoe_hub.report.read import read_report

# A report, a config, or the neurons of a hundred layers of a thousand experts.
_MOST_BYTES = 512_000_000
_HINT = "download it again, or repeat the conversion"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Like:
    """Another conversion.

    Attributes:
        label: What messages call its result.
        record: Where its report comes from, as reports name it.
        report: Its report.
        recipe: Its method.
        config: ``config.json`` of its result; ``None`` if that is not at hand.
        neurons: Content of the file that lists its neurons; ``None`` if there is none.
        origins: The neurons by decoder layer, once they are read; empty where they are chosen anew.
    """

    label: str
    record: LikeRecord
    report: ConversionReport
    recipe: Recipe
    config: Mapping[str, Any] | None
    neurons: bytes | None
    origins: Mapping[int, NeuronOrigins] = field(default_factory=dict)

    def layer(self, number: int) -> LayerReport:
        """What it chose in a decoder layer."""
        return next(layer for layer in self.report.layers if layer.layer == number)

    def experts_by_layer(self, numbers: Iterable[int]) -> dict[int, int]:
        """Experts that it left in decoder layers."""
        return {number: self.layer(number).experts for number in numbers}


def open_like(result: str, *, token: str | None = None, cache_dir: Path | None = None) -> Like:
    """Opens another conversion's result.

    Args:
        result: Its folder, the path of its ``hcsmoe.json``, or its repository on the Hub.
        token: Access token; ``None`` uses the stored login.
        cache_dir: Hub cache; ``None`` uses the default one.

    Raises:
        SourceError: If there is no such result, or its report cannot be read.
        PlanError: If its choices are not all recorded.
    """
    path = Path(result).expanduser()
    is_file = path.is_file()
    source = LocalSource(path.parent) if is_file else open_source(result, token=token, cache_dir=cache_dir)
    name = path.name if is_file else REPORT_FILE
    content = _content(source, name)
    if content is None:
        raise SourceError(
            f"{source.label} has no {REPORT_FILE}, so it is not a result of 'hcsmoe convert'.",
            hint="pass a folder that 'hcsmoe convert' wrote, its hcsmoe.json, or its repository with `like`",
        )
    where = f"{source.label}/{name}"
    report = read_report(_text(content, where), label=where)
    recipe = read_recipe(report.method)
    if recipe.clustering is Clustering.FUZZY:
        raise PlanError(
            f"{result} was made with `clustering='fuzzy'`, whose memberships its report does not record.",
            hint="use a result of another clustering with `like`",
        )
    _check_choices(report, recipe, where)
    config = _content(source, "config.json")
    neurons = None if report.neurons is None else _content(source, NEURONS_FILE)
    return Like(
        label=result,
        record=_record(source, name, content),
        report=report,
        recipe=recipe,
        config=None if config is None else parse_config(_text(config, source.label), where=source.label),
        neurons=neurons,
    )


def _content(source: Source, name: str) -> bytes | None:
    """Content of a file of a result; ``None`` if it has none of this name."""
    # Not all files of a folder: it may be a home with a report in it.
    is_there = name in source.files() if source.path is None else (source.path / name).is_file()
    if not is_there:
        return None
    path = source.fetch(name)
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise SourceError(f"{source.label}/{name} has {size} bytes, and no such file needs more.", hint=_HINT)
    return path.read_bytes()


def _text(content: bytes, where: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise SourceError(f"{where} is damaged: it is not UTF-8 text.", hint=_HINT) from error


def _record(source: Source, name: str, content: bytes) -> LikeRecord:
    """How the report of a new conversion names the one whose choices it applied: without the path of a folder."""
    digest = sha256(content).hexdigest()
    if source.repo_id is not None:
        return {"repo_id": source.repo_id, "revision": source.revision, "sha256": digest, "neurons": False}
    path = source.name if name == REPORT_FILE else name
    return {"path": path, "revision": None, "sha256": digest, "neurons": False}


def _check_choices(report: ConversionReport, recipe: Recipe, where: str) -> None:
    """Checks that every layer has the experts that its method leaves.

    Raises:
        SourceError: If it does not.
    """
    is_pruned = recipe.method is Method.PRUNE
    for layer in report.layers:
        members = layer.members()
        if len(layer.labels) != report.experts["before"]:
            why = f"layer {layer.layer} has {len(layer.labels)} labels for {report.experts['before']} experts"
        elif is_pruned and any(len(cluster) > 1 for cluster in members):
            why = f"layer {layer.layer} has clusters, but its experts were pruned"
        elif not is_pruned and layer.pruned:
            why = f"layer {layer.layer} leaves experts out, but its experts were merged"
        else:
            continue
        raise SourceError(f"{where} is damaged: {why}.", hint=_HINT)


def like_options(like: Like, options: ConvertOptions) -> ConvertOptions:
    """The options of a conversion that applies another one's choices.

    Args:
        like: The other conversion.
        options: What is given.

    Returns:
        The same with the other's number of experts and its method; what follows the choices is taken from it as well
        unless it is given.

    Raises:
        PlanError: If an option that is given contradicts a choice.
    """
    experts = like.report.experts
    if options.experts not in (None, experts["after"]):
        raise PlanError(
            f"`experts={options.experts}` was given, but {like.label}, whose choices `like` applies, has "
            f"{experts['after']} experts per layer.",
            hint="leave `experts` out, or `like`",
        )
    width = experts.get("width_after")
    if options.expert_width is not None and _neurons(options.expert_width, like) != width:
        raise PlanError(
            f"`expert_width={options.expert_width}` was given, but {like.label}, whose choices `like` applies, keeps "
            f"{'all neurons' if width is None else f'{width} neurons'} of every expert.",
            hint="leave `expert_width` out, or `like`",
        )
    is_routed_alike = experts["per_token_after"] == experts["per_token_before"]
    return replace(
        options,
        experts=experts["after"],
        expert_width=width,
        experts_per_token=options.experts_per_token or (None if is_routed_alike else experts["per_token_after"]),
        method=_method(like, options.method),
    )


def _neurons(width: int | str, like: Like) -> int | None:
    """The neurons that a width leaves experts of the other conversion's source; ``None`` if that is not known."""
    if isinstance(width, int):
        return width
    before = like.report.experts.get("width_before")
    return None if before is None else round_width(round(before * float(width[:-1]) / 100), before)


def _method(like: Like, asked: MethodOptions) -> MethodOptions:
    """The recorded method with what is asked for afterwards, every choice given."""
    if asked.preset is not None:
        raise PlanError(
            f"`preset='{asked.preset}'` names a method, but `like` takes that of {like.label}.",
            hint="leave `preset` out, or `like`",
        )
    recorded = {name.name: getattr(like.recipe, name.name) for name in fields(Recipe)}
    if isinstance(recorded["refit"], FormerRefit):
        recorded["refit"] = Refit.BLOCK
    wanted = {name: value for name, value in given(asked).items() if name != "seed" and value != ()}
    for name, value in wanted.items():
        if name not in AFTERWARDS and value != recorded[name]:
            had = f"`{name}={_shown(recorded[name])}`" if recorded[name] not in (None, ()) else f"no `{name}`"
            raise PlanError(
                f"`{name}={_shown(value)}` contradicts the choices of {like.label}, which `like` applies: it was made "
                f"with {had}.",
                hint=f"leave `{name}` out, or `like`",
            )
    start = MethodOptions(**_given(recorded))
    own = {name: value for name, value in wanted.items() if name in AFTERWARDS}
    recipe = resolve(MethodOptions(**own, protect=start.protect, seed=asked.seed), start=start)
    chosen = {name.name: getattr(recipe, name.name) for name in fields(Recipe)}
    return MethodOptions(preset=Preset.HC_SMOE, **_given(chosen))


def _given(choices: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in choices.items() if value is not None}


def _shown(value: Any) -> str:
    """A value as messages show it."""
    is_list = isinstance(value, tuple) and value and isinstance(value[0], str)
    return repr("+".join(value) if is_list else str(value) if isinstance(value, str) else value)
