"""The result and its teacher: what a recovery refuses, and how both come into memory."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.errors import PlanError, SourceError, UnsupportedModelError
from hcsmoe_hub.events import Listener, Warned
from hcsmoe_hub.machine.device import compute_dtype
from hcsmoe_hub.model.layer_loader import set_parameter
from hcsmoe_hub.model.source_model import SourceModel, read_model
from hcsmoe_hub.options import Layout
from hcsmoe_hub.pipeline.whole_model import load_whole
from hcsmoe_hub.recovery.options import Precision
from hcsmoe_hub.report import REPORT_FILE, ConversionReport
from hcsmoe_hub.report.read import read_report
from hcsmoe_hub.result.make_report import describe_source


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A result and its teacher, of which only configs and headers have been read.

    Attributes:
        result: The result.
        report: Its ``hcsmoe.json``.
        teacher: The teacher.
    """

    result: SourceModel
    report: ConversionReport
    teacher: SourceModel


def open_models(result: Source, teacher: Source, emit: Listener) -> Opened:
    """Checks that a result can be trained, and that a teacher is one for it.

    Args:
        result: The result.
        teacher: The teacher.
        emit: Called with a warning if the result was made from another checkpoint.

    Raises:
        SourceError: If either is damaged, or the result is not one of hcsmoe.
        UnsupportedModelError: If transformers cannot train the result.
        PlanError: If their vocabularies differ, or one of them alone has an encoder.
    """
    report = _read_report(result)
    model, other = read_model(result, with_mtp=False), read_model(teacher, with_mtp=False)
    if model.is_quantized:
        raise UnsupportedModelError(
            f"{result.label} is quantised, and its weights cannot be trained as they are stored.",
            hint="convert with `dtype='bfloat16'`, recover that result, and quantise it afterwards",
        )
    if report.method["layout"] == Layout.FULL:
        raise UnsupportedModelError(
            f"{result.label} stores copies of merged experts (`layout='full'`), which training would make differ.",
            hint="convert with `layout='reduced'` or `layout='mapped'`",
        )
    if model.skeleton.is_encoder_decoder != other.skeleton.is_encoder_decoder:
        having, lacking = (model, other) if model.skeleton.is_encoder_decoder else (other, model)
        raise PlanError(
            f"{having.source.label} has an encoder and {lacking.source.label} has none, so one cannot learn from the "
            "other.",
            hint="pass the checkpoint that the result was made from as `teacher`",
            option="teacher",
        )
    sizes = [each.skeleton.text_config.vocab_size for each in (model, other)]
    if sizes[0] != sizes[1]:
        raise PlanError(
            f"{result.label} has a vocabulary of {sizes[0]} tokens and {teacher.label} of {sizes[1]}, so one cannot "
            "learn from the other.",
            hint="pass the checkpoint that the result was made from as `teacher`",
            option="teacher",
        )
    if report.source.get("fingerprint") != describe_source(teacher)["fingerprint"]:
        made_from = report.source.get("repo_id") or report.source.get("path")
        emit(Warned(f"{result.label} was made from {made_from}, whose content is not that of {teacher.label}."))
    return Opened(result=model, report=report, teacher=other)


def _read_report(result: Source) -> ConversionReport:
    if REPORT_FILE not in result.files():
        raise SourceError(
            f"{result.label} has no {REPORT_FILE}, so it is not a result of hcsmoe.",
            hint="pass a folder or repository that 'hcsmoe convert' has written",
        )
    label = f"{REPORT_FILE} of {result.label}"
    return read_report(result.fetch(REPORT_FILE).read_text("utf-8", errors="replace"), label=label)


def precision(dtype: Precision, device: torch.device) -> torch.dtype:
    """The dtype that a device is to compute in."""
    if dtype is Precision.AUTO:
        return compute_dtype(device)
    return torch.bfloat16 if dtype is Precision.BFLOAT16 else torch.float32


def load_model(
    source: Source, device: torch.device, emit: Listener, *, compute: torch.dtype
) -> tuple[SourceModel, Mapping[str, Tensor]]:
    """A model in memory, without parts that text does not run through.

    Args:
        source: Its checkpoint.
        device: Where it is to run.
        emit: Called with downloads.
        compute: What it is to compute in.

    Returns:
        The model, and of its routers and norms the tensors as they are stored, by parameter name.

    Raises:
        SourceError: If weights are damaged, or are not finite numbers.
    """
    model, stored = load_whole(source, device, emit, compute=compute)
    skeleton = model.skeleton
    for broken in skeleton.broken:
        raise SourceError(
            f"tensor {broken!r} of {source.label} holds numbers that are not finite.", hint="convert again"
        )
    for name in skeleton.aside:
        # What has no storage cannot be moved, and Trainer moves whole models.
        set_parameter(skeleton.module, name, torch.empty(0, dtype=skeleton.dtype, device=device))
    return model, stored
