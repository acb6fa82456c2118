"""Checks that a result has the layout that its report and its config declare, and brings no foreign code."""

from hcsmoe_hub.errors import SourceError, VerificationError
from hcsmoe_hub.model.source_model import SourceModel
from hcsmoe_hub.model.width import neurons_of
from hcsmoe_hub.options import Layout
from hcsmoe_hub.planning.neuron_file import read_neuron_file
from hcsmoe_hub.planning.own_code import OWN_CODE
from hcsmoe_hub.planning.sizes import stored_experts
from hcsmoe_hub.report import NEURONS_FILE, REPORT_FILE, ConversionReport
from hcsmoe_hub.report.read import read_report

# What the refit of the whole model trains.
REFITTED = frozenset({"router", "experts", "norms"})


def experts_per_layer(model: SourceModel) -> int:
    """Experts that a checkpoint stores in the MoE layer with the most of them."""
    return max(stored_experts(model).values())


def layout_of(model: SourceModel) -> Layout:
    """Layout of a checkpoint: its config shows factors or a map, but only its report shows copies of merged experts.

    Raises:
        VerificationError: If there is a report that cannot be read.
    """
    if model.factors is not None:
        return Layout.FACTORED
    if model.expert_map is not None:
        return Layout.MAPPED
    is_full = REPORT_FILE in model.source.files() and _layout(_read_claims(model)) is Layout.FULL
    return Layout.FULL if is_full else Layout.REDUCED


def trained_parts(model: SourceModel) -> frozenset[str]:
    """What of a result was trained on its source's logits: ``router``, ``experts``, ``norms``, or ``lora`` for all.

    Raises:
        VerificationError: If there is a report that cannot be read.
    """
    if REPORT_FILE not in model.source.files():
        return frozenset()
    report = _read_claims(model)
    refitted = REFITTED if report.refit_model is not None and report.refit_model.is_kept else frozenset[str]()
    recovery = report.recovery
    is_recovered = recovery is not None and recovery["kept_step"] > 0
    return refitted.union(recovery["settings"]["train"]) if recovery is not None and is_recovered else refitted


def _read_claims(model: SourceModel) -> ConversionReport:
    """Reads the report of a checkpoint.

    Raises:
        VerificationError: If it is damaged, or of a version that this program does not read.
    """
    try:
        return read_report(model.source.text(REPORT_FILE), label=REPORT_FILE)
    except SourceError as error:
        raise VerificationError(error.message, hint=error.hint) from error


def check_report(model: SourceModel) -> None:
    """Checks the report of a conversion, if there is one, against the config.

    Raises:
        VerificationError: If they differ in layout, counts, widths or clusters.
    """
    if REPORT_FILE not in model.source.files():
        return
    report = _read_claims(model)
    layout, after = _layout(report), report.experts["after"]
    labels = {layer.layer: tuple(layer.labels) for layer in report.layers}
    if (layout is Layout.MAPPED) != (model.expert_map is not None):
        kind = "no map" if model.expert_map is None else "a map"
        raise VerificationError(
            f"{REPORT_FILE} names the layout {layout}, but config.json has {kind} from router rows to experts.",
            hint="convert again",
        )
    if (layout is Layout.FACTORED) != (model.factors is not None):
        kind = "no sizes" if model.factors is None else "sizes"
        raise VerificationError(
            f"{REPORT_FILE} names the layout {layout}, but config.json has {kind} of factors.", hint="convert again"
        )
    if model.expert_map is not None and dict(model.expert_map) != labels:
        raise VerificationError(
            f"the clusters in {REPORT_FILE} are not those that config.json maps router rows to.", hint="convert again"
        )
    if strangers := sorted(labels.keys() - {block.layer for block in model.blocks}):
        why = f"; there is an MTP head, {model.mtp_problem}" if model.mtp_problem is not None else ""
        raise VerificationError(
            f"{REPORT_FILE} reports on layer {strangers[0]}, which is not an MoE layer of the model{why}.",
            hint="convert again",
        )
    # The others do not change the count in the config.
    claimed = after if layout in (Layout.REDUCED, Layout.FACTORED) else report.experts["before"]
    if claimed != model.settings.experts:
        raise VerificationError(
            f"{REPORT_FILE} declares {claimed} experts, config.json {model.settings.experts}.", hint="convert again"
        )
    # A report names the widths only where experts became narrower.
    width, found = report.experts.get("width_after"), neurons_of(model)
    if width is not None and width != found:
        raise VerificationError(
            f"{REPORT_FILE} declares experts of {width} neurons, config.json experts of {found}.", hint="convert again"
        )
    counts = [layer.experts for layer in report.layers]
    if not min(counts) <= after <= max(counts):
        raise VerificationError(
            f"{REPORT_FILE} declares {after} experts per layer, but its layers have {min(counts)} to {max(counts)}.",
            hint="convert again",
        )


def check_neurons(model: SourceModel) -> None:
    """Checks the file that lists where the neurons of the experts come from, if the report lists it.

    Raises:
        VerificationError: If it is missing, or is not what the report says.
    """
    if REPORT_FILE not in model.source.files():
        return
    report, size = _read_claims(model), neurons_of(model)
    record = report.neurons
    if record is None:
        return
    if NEURONS_FILE not in model.source.files():
        raise VerificationError(
            f"{REPORT_FILE} lists {NEURONS_FILE}, which is missing.", hint="download it, or convert again"
        )
    if record["after"] != size:
        raise VerificationError(
            f"{REPORT_FILE} declares {record['after']} neurons per expert, but the experts have {size}.",
            hint="convert again",
        )
    try:
        read_neuron_file(model.source.fetch(NEURONS_FILE).read_bytes(), record, report)
    except ValueError as error:
        raise VerificationError(
            f"{NEURONS_FILE} is damaged: {error}.", hint="download it again, or convert again"
        ) from error


def _layout(report: ConversionReport) -> Layout:
    """The layout that a report names.

    Raises:
        VerificationError: If this program does not know it.
    """
    name = report.method["layout"]
    if name not in set(Layout):
        raise VerificationError(
            f"{REPORT_FILE} names the layout {name!r}, which this version of hcsmoe does not know.",
            hint="use a newer hcsmoe",
        )
    return Layout(name)


def check_code(model: SourceModel) -> None:
    """Checks that a result that needs code brings the code that loads it, and no other code that would run.

    Raises:
        VerificationError: If what it brings is not, byte for byte, what this version writes.
    """
    code = OWN_CODE.get(layout_of(model))
    if code is None:
        return
    source = model.source
    is_ours = code.file in source.files() and source.fetch(code.file).read_bytes() == code.source(model).encode()
    if not is_ours or source.config.get("auto_map") != code.auto_map(model):
        raise VerificationError(
            f"{code.file} or auto_map of {source.label} is not what this version of hcsmoe writes, and foreign "
            "code is never run.",
            hint="convert again, or verify it with the version that made it",
        )
    if any(file.startswith("custom_generate/") for file in source.files()):
        raise VerificationError(
            f"{source.label} has code of its own in custom_generate, and foreign code is never run.",
            hint="remove that folder",
        )
