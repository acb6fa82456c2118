"""Results whose choices cannot be applied: other shapes, options that contradict them, and files that are damaged."""

import io
import json
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sisters import alike, choices, made, neurons, perturb
from tiny_models import build, change_tensors, refuse

from hcsmoe_hub import convert, plan, verify
from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.errors import HcsmoeError, PlanError, SourceError, VerificationError
from hcsmoe_hub.options import ConvertOptions, MethodOptions, Target
from hcsmoe_hub.report import NEURONS_FILE, REPORT_FILE
from hcsmoe_hub.report.read import read_report


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral: 2 layers, 8 experts."""
    return build(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def sister(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after some training."""
    folder = build(tmp_path_factory.mktemp("sister") / "sister")
    change_tensors(folder, perturb)
    return folder


@pytest.fixture(scope="module")
def result(base: Path) -> Path:
    """The base model converted as it is by default."""
    made(base, base.parent / "result", {})
    return base.parent / "result"


# Older results, and files that are not what they should be


def copied(result: Path, folder: Path) -> Path:
    """Report, config and neurons of a result, without its weights."""
    folder.mkdir()
    for name in (REPORT_FILE, NEURONS_FILE, "config.json"):
        (folder / name).write_bytes((result / name).read_bytes())
    return folder


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    report = json.loads((folder / REPORT_FILE).read_text())
    change(report)
    (folder / REPORT_FILE).write_text(json.dumps(report))


def test_a_result_without_neurons_gives_its_clusters(result: Path, sister: Path, tmp_path: Path) -> None:
    older = copied(result, tmp_path / "older")
    (older / NEURONS_FILE).unlink()
    edit(older, lambda report: report.pop("neurons"))
    chosen = alike(sister, tmp_path / "made", older, method=MethodOptions(refit="none"))
    note = f"{older} has no {NEURONS_FILE}: its choice of experts is applied, but the neurons of each are chosen"
    assert [text for text in plan(sister, chosen).warnings if text.startswith(note)]
    report = convert(sister, chosen)
    assert choices(report) == choices(read_report((result / REPORT_FILE).read_text(), label="result"))
    assert report.like is not None
    assert report.like["neurons"] is False
    assert neurons(tmp_path / "made") != neurons(result)


def packed(**arrays: Any) -> bytes:
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    return content.getvalue()


def arrays_of(result: Path) -> dict[str, Any]:
    with np.load(result / NEURONS_FILE) as arrays:
        return dict(arrays)


def zipped(content: bytes, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for what in ("expert", "neuron"):
            archive.writestr(f"0.{what}.npy", content)
    return file.getvalue()


def array(shape: str, numbers: bytes = b"") -> bytes:
    """A file of numpy with any header."""
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00\x76\x00" + header.ljust(118) + numbers


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], bytes], str]] = {
    "text": (lambda arrays: b"hello", "it is not a zip file of arrays"),
    "cut off": (lambda arrays: packed(**arrays)[:-40], "it is not a zip file of arrays"),
    "pickles": (
        lambda arrays: packed(**arrays | {"0.expert": np.array([[{}] * 48] * 5)}),
        "its array 0.expert",
    ),
    "a bomb": (lambda arrays: zipped(bytes(10_000_000)), "its array 0.expert has 10000000 bytes, more than 5 x 48"),
    "a huge shape": (
        lambda arrays: zipped(array("(9999999999, 48)")),
        r"its array 0.expert is uint8 \[9999999999, 48\], not unsigned integers \[5, 48\]",
    ),
    "nonsense": (lambda arrays: zipped(array("(" * 60)), "it is not a zip file of arrays|[Hh]eader"),
    "another way of packing": (lambda arrays: zipped(b"x", zipfile.ZIP_LZMA), "is compressed in another way"),
    "too few numbers": (
        lambda arrays: zipped(array("(5, 48)", b"1")),
        "has 1 numbers, not 5 x 48",
    ),
    "negative numbers": (
        lambda arrays: packed(**arrays | {"0.neuron": -arrays["0.neuron"].astype(np.int8)}),
        r"its array 0.neuron is int8 \[5, 48\], not unsigned integers",
    ),
    "floats": (
        lambda arrays: packed(**arrays | {"0.neuron": arrays["0.neuron"].astype(np.float32)}),
        r"its array 0.neuron is float32 \[5, 48\]",
    ),
    "another shape": (lambda arrays: packed(**arrays | {"0.neuron": arrays["0.neuron"][:, 1:]}), r"uint8 \[5, 47\]"),
    "a neuron too many": (
        lambda arrays: packed(**arrays | {"0.neuron": np.full((5, 48), 48, np.uint8)}),
        "the neurons of layer 0 name an expert or a neuron that the source does not have",
    ),
    "a neuron twice": (
        lambda arrays: packed(**arrays | {"0.neuron": arrays["0.neuron"] * 0}),
        "the neurons of layer 0 name one neuron twice",
    ),
    "other clusters": (
        lambda arrays: packed(**arrays | {"0.expert": arrays["0.expert"][::-1]}),
        "the neurons of layer 0 come from experts of other clusters",
    ),
    "another layer": (
        lambda arrays: packed(**arrays, **{"7.expert": arrays["0.expert"], "7.neuron": arrays["0.neuron"]}),
        "it lists neurons of layer 7, which hcsmoe.json does not have",
    ),
    "one array": (lambda arrays: packed(**{"0.expert": arrays["0.expert"]}), "one array of experts and one of neurons"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_of_neurons_that_is_damaged_is_refused_with_one_message(
    result: Path, sister: Path, tmp_path: Path, damage: str
) -> None:
    change, message = DAMAGE[damage]
    broken = copied(result, tmp_path / "broken")
    (broken / NEURONS_FILE).write_bytes(change(arrays_of(result)))
    chosen = alike(sister, tmp_path / "made", broken)
    with pytest.raises(SourceError, match=r"is not the file whose digest hcsmoe\.json lists"):
        plan(sister, chosen)
    digest = sha256((broken / NEURONS_FILE).read_bytes()).hexdigest()
    edit(broken, lambda report: report["neurons"].update(sha256=digest))
    with pytest.raises(SourceError, match=f"{NEURONS_FILE} of .* is damaged: .*({message})"):
        plan(sister, chosen)


def test_verify_checks_the_file_of_neurons(base: Path, result: Path, tmp_path: Path) -> None:
    verify(result, against=LocalSource(base))
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in result.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / NEURONS_FILE).write_bytes(packed(**{"0.expert": [1]}))
    with pytest.raises(VerificationError, match=f"{NEURONS_FILE} is damaged: it is not the file whose digest"):
        verify(copy)
    (copy / NEURONS_FILE).unlink()
    with pytest.raises(VerificationError, match=f"lists {NEURONS_FILE}, which is missing"):
        verify(copy)


# What does not fit


REFUSALS: dict[str, tuple[dict[str, Any], str, str]] = {
    "experts": (
        {"experts": 4},
        "`experts=4` was given, but RESULT, whose choices `like` applies, has 5 experts per layer.",
        "leave `experts` out, or `like`",
    ),
    "width": (
        {"expert_width": 32},
        "`expert_width=32` was given, but RESULT, whose choices `like` applies, keeps all neurons of every expert.",
        "leave `expert_width` out, or `like`",
    ),
    "preset": (
        {"method": MethodOptions(preset="reap")},
        "`preset='reap'` names a method, but `like` takes that of RESULT.",
        "leave `preset` out, or `like`",
    ),
    "linkage": (
        {"method": MethodOptions(linkage="ward")},
        "`linkage='ward'` contradicts the choices of RESULT, which `like` applies: it was made with `linkage='loss'`.",
        "leave `linkage` out, or `like`",
    ),
    "saliency": (
        {"method": MethodOptions(saliency="reap", refit="none")},
        "`saliency='reap'` contradicts the choices of RESULT, which `like` applies: it was made with no `saliency`.",
        "leave `saliency` out, or `like`",
    ),
    "similarity": (
        {"method": MethodOptions(similarity="weight+router-logits")},
        "`similarity='weight+router-logits'` contradicts the choices of RESULT, which `like` applies: it was made with "
        "no `similarity`.",
        "leave `similarity` out, or `like`",
    ),
    "protect": (
        {"method": MethodOptions(protect=((None, 0),))},
        "`protect=((None, 0),)` contradicts the choices of RESULT, which `like` applies: it was made with no "
        "`protect`.",
        "leave `protect` out, or `like`",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_an_option_that_contradicts_a_choice_is_refused(result: Path, tmp_path: Path, name: str) -> None:
    given, message, hint = REFUSALS[name]
    source = build(tmp_path / "sister")
    error = refuse(source, PlanError, alike(source, tmp_path / "made", result, **given))
    assert (error.message.replace(str(result), "RESULT"), error.hint) == (message, hint)


def test_the_width_of_the_other_result_may_be_repeated(base: Path, sister: Path, tmp_path: Path) -> None:
    made(base, tmp_path / "first", {"preset": "reap"}, {"experts": 5, "expert_width": 24})
    for same in (24, "50%", None):
        chosen = alike(sister, tmp_path / "made", tmp_path / "first", expert_width=same)
        assert (plan(sister, chosen).experts, plan(sister, chosen).width) == (5, 24)
    error = refuse(sister, PlanError, alike(sister, tmp_path / "made", tmp_path / "first", expert_width="75%"))
    assert "keeps 24 neurons of every expert" in error.message


STRANGERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "model_type": ("qwen3_moe", {}, "model_type mixtral, but {} has qwen3_moe."),
    "experts": ("mixtral", {"num_local_experts": 6}, "experts per layer: 8, but {} has 6."),
    "top-k": ("mixtral", {"num_experts_per_tok": 3}, "active experts per token: 2, but {} has 3."),
    "layers": ("mixtral", {"num_hidden_layers": 3}, "the MoE layers 0-1, but {} has 0-2."),
    "hidden size": ("mixtral", {"hidden_size": 64, "head_dim": 16}, "hidden_size 32, but {} has 64."),
    "expert size": ("mixtral", {"intermediate_size": 40}, "intermediate_size 48, but {} has 40."),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_model_of_another_shape_is_refused_with_both_values(result: Path, tmp_path: Path, name: str) -> None:
    model_type, sizes, message = STRANGERS[name]
    source = build(tmp_path / "stranger", model_type, **sizes)
    error = refuse(source, PlanError, alike(source, tmp_path / "made", result))
    assert error.message == f"the choices of {result} were made on a model with {message.format(source)}"


def test_the_width_of_experts_is_compared_without_a_config(result: Path, tmp_path: Path) -> None:
    bare = copied(result, tmp_path / "bare")
    (bare / "config.json").unlink()
    source = build(tmp_path / "stranger", intermediate_size=40)
    error = refuse(source, PlanError, alike(source, tmp_path / "made", bare))
    assert error.message.endswith(f"neurons per expert: 48, but {source} has 40.")


def test_a_vocabulary_or_a_context_of_another_size_fits(result: Path, tmp_path: Path) -> None:
    source = build(tmp_path / "sister", vocab_size=72, max_position_embeddings=128)
    assert plan(source, alike(source, tmp_path / "made", result)).experts_by_layer == {0: 5, 1: 5}


def test_memberships_are_not_recorded(base: Path, sister: Path, tmp_path: Path) -> None:
    made(base, tmp_path / "first", {"preset": "hc-smoe", "clustering": "fuzzy"})
    error = refuse(sister, PlanError, alike(sister, tmp_path / "made", tmp_path / "first"))
    assert "whose memberships its report does not record" in error.message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda report: report["layers"][0]["labels"].append(0), "labels contradicts"),
        (
            lambda report: report["layers"][0].update(labels=[*range(5), -1, -1, -1], dominant=[*range(5)]),
            "were merged",
        ),
        (lambda report: report["neurons"].update(after=10**12), "experts of 48 neurons keep 1000000000000"),
        (lambda report: report["neurons"].update(before=10**12), "neurons per expert: 1000000000000, but"),
        (lambda report: report.update(layers=[]), "layers is empty"),
    ],
)
def test_a_report_that_contradicts_itself_is_refused(
    result: Path, sister: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    broken = copied(result, tmp_path / "broken")
    edit(broken, change)
    with pytest.raises(HcsmoeError, match=message):
        plan(sister, alike(sister, tmp_path / "made", broken))


def test_what_is_not_a_result_is_refused(base: Path, sister: Path, tmp_path: Path) -> None:
    for wrong, message in ((base, f"{base} has no {REPORT_FILE}"), (tmp_path / "nothing", "there is no folder")):
        with pytest.raises(SourceError, match=message):
            plan(sister, alike(sister, tmp_path / "made", wrong))


def test_a_count_a_target_or_a_result_to_follow_is_needed() -> None:
    with pytest.raises(PlanError, match="what it may weigh, but neither is given") as caught:
        ConvertOptions()
    assert caught.value.hint == "give `experts`, `expert_width`, or both; or one target; or `like`"
    with pytest.raises(PlanError, match="a target is given as well"):
        ConvertOptions(like="me/result", target=Target(ratio=0.5))
