"""The teacher's logits on disk: what they hold, going on after an end, and what they are not used for."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import save_tiny
from test_quantized_sources import fp8_source  # noqa: F401
from tiny_models import build
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from hcsmoe_hub.checkpoint.owner import owning
from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.errors import OutputError, PlanError
from hcsmoe_hub.evaluation.checkpoint import Checkpoint
from hcsmoe_hub.events import Event, Stage, StageAdvanced, StageResumed, ignore
from hcsmoe_hub.methods.distil.top_k import keep_top_k
from hcsmoe_hub.recovery import teacher_logits
from hcsmoe_hub.recovery.teacher import TopLogits
from hcsmoe_hub.recovery.teacher_logits import INDEX, LogitsStore

CPU = torch.device("cpu")
N, L, V = 7, 12, 64
TEMPERATURE = 2.0


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("teacher") / "mixtral")


def ids(seed: int = 0, count: int = N) -> Tensor:
    return torch.randint(0, V, (count, L), generator=torch.Generator().manual_seed(seed))


Make = Callable[..., LogitsStore]


@pytest.fixture
def make(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Describes a store in which a file holds two sequences."""
    monkeypatch.setattr(teacher_logits, "FILE_BYTES", 2 * L * (8 * 4 + 8))

    def make(**others) -> LogitsStore:
        settings = {"folder": tmp_path / "logits", "ids_NL": ids(), "top": 8, "temperature": TEMPERATURE} | others
        source = settings.pop("source", teacher)
        return LogitsStore(teacher=Checkpoint(LocalSource(source)), **settings)

    return make


def everything(store: LogitsStore) -> TopLogits:
    return store.open().targets(torch.arange(len(store.ids_NL)), store.ids_NL)


def logits(folder: Path, ids_NL: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=ids_NL).logits


def test_a_store_holds_the_most_likely_tokens_and_the_mass_of_the_others(make, teacher):
    store = make()
    store.fill(CPU, ignore)
    expected, found = keep_top_k(logits(teacher, ids()), 8, TEMPERATURE), everything(store)
    assert torch.equal(found.tokens_BTP, expected.tokens)
    torch.testing.assert_close(found.values_BTP.float(), expected.values, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(found.rest_BT, expected.rest, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.warm_rest_BT, expected.warm_rest, rtol=1e-4, atol=1e-4)


def test_sequences_are_read_in_any_order(make):
    store = make()
    store.fill(CPU, ignore)
    whole, some = everything(store), store.open().targets(torch.tensor([6, 0, 3]), ids()[:3])
    assert torch.equal(some.tokens_BTP, whole.tokens_BTP[[6, 0, 3]])
    assert torch.equal(some.values_BTP, whole.values_BTP[[6, 0, 3]])


def test_a_streamed_teacher_gives_the_same_logits(make, teacher, tmp_path, monkeypatch):
    loaded, streamed = make(), make(folder=tmp_path / "streamed")
    loaded.fill(CPU, ignore)
    monkeypatch.setattr("hcsmoe_hub.evaluation.scorers.free_bytes", lambda device: 0)
    streamed.fill(CPU, ignore)
    one, other = everything(loaded), everything(streamed)
    assert torch.equal(one.tokens_BTP, other.tokens_BTP)
    torch.testing.assert_close(one.values_BTP, other.values_BTP, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_teachers_of_other_families_are_read_as_evaluations_read_them(make, tmp_path, model_type):
    folder = tmp_path / model_type
    save_tiny(model_type, folder)
    vocabulary = Checkpoint(LocalSource(folder)).vocab_size
    store = make(source=folder, ids_NL=ids() % vocabulary, top=10 * vocabulary)
    store.fill(CPU, ignore)
    found = everything(store)
    assert found.tokens_BTP.shape == (N, L, vocabulary)
    assert bool((found.rest_BT == float("-inf")).all())


def test_a_quantised_teacher_is_read_layer_by_layer(make, request, monkeypatch):
    folder = request.getfixturevalue("fp8_source")
    monkeypatch.setattr("hcsmoe_hub.evaluation.scorers.free_bytes", lambda device: 0)
    store = make(source=folder)
    store.fill(CPU, ignore)
    settings = {"dtype": torch.bfloat16, "quantization_config": FineGrainedFP8Config(dequantize=True)}
    model = torch.nn.Module.float(AutoModelForCausalLM.from_pretrained(folder, **settings))
    with torch.no_grad():
        expected = keep_top_k(model(input_ids=ids()).logits, 8, TEMPERATURE)
    assert torch.equal(everything(store).tokens_BTP, expected.tokens)


def test_the_announced_size_is_about_that_of_the_files(make):
    store = make()
    assert store.missing_bytes == store.bytes
    store.fill(CPU, ignore)
    written = sum(path.stat().st_size for path in store.folder.glob("*.arrow"))
    # Headers of files this small take as much as their content.
    assert store.bytes / 2 < written < store.bytes * 4
    assert store.missing_bytes == 0


def test_a_run_that_was_ended_goes_on_after_its_last_whole_file(make):
    store, seen = make(), []

    def ending(event: Event) -> None:
        seen.append(event)
        if sum(isinstance(each, StageAdvanced) for each in seen) == 5:
            raise Stop

    with pytest.raises(Stop):
        store.fill(CPU, ending)
    assert store.done == 4
    seen.clear()
    store.fill(CPU, seen.append)
    assert [event for event in seen if isinstance(event, StageResumed)] == [StageResumed(Stage.TEACHER, 4)]
    assert sum(isinstance(event, StageAdvanced) for event in seen) == N - 4
    whole = make(folder=store.folder.parent / "whole")
    whole.fill(CPU, ignore)
    assert torch.equal(everything(store).tokens_BTP, everything(whole).tokens_BTP)


def test_a_complete_store_is_used_without_running_the_teacher(make, monkeypatch):
    make().fill(CPU, ignore)
    monkeypatch.setattr(teacher_logits, "make_scorers", None)
    make().fill(CPU, ignore)
    assert make().done == N


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ids_NL": ids(1)}, "token ids"),
        ({"ids_NL": ids(count=3)}, "sequences is 7 there and 3 here"),
        ({"top": 4}, "logits per token is 8 there and 4 here"),
        ({"temperature": 3.0}, "temperature is 2.0 there and 3.0 here"),
        ({"text": {"data": "other.txt", "seed": 1}}, "data is None there and 'other.txt' here"),
    ],
)
def test_logits_of_something_else_are_refused_with_the_first_difference(make, change, named):
    make().fill(CPU, ignore)
    with pytest.raises(PlanError, match=named) as caught:
        make(**change).check()
    assert caught.value.option == "teacher_logits"


def test_logits_of_another_teacher_are_refused(make, tmp_path):
    make().fill(CPU, ignore)
    other = build(tmp_path / "mixtral", num_hidden_layers=1)
    with pytest.raises(PlanError, match="teacher's weights is"):
        make(source=other).fill(CPU, ignore)


def test_a_folder_with_other_files_is_refused(make, tmp_path):
    (tmp_path / "logits").mkdir()
    (tmp_path / "logits" / "thesis.tex").touch()
    with pytest.raises(PlanError, match="holds other files"):
        make().fill(CPU, ignore)


def test_a_file_in_place_of_the_folder_is_refused(make, tmp_path):
    (tmp_path / "logits").touch()
    with pytest.raises(PlanError, match="is a file"):
        make().check()


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 2, "identity": {}}', '{"version": 1}'])
def test_a_damaged_index_is_refused(make, content):
    store = make()
    store.fill(CPU, ignore)
    (store.folder / INDEX).write_text(content)
    with pytest.raises(PlanError) as caught:
        make().check()
    assert "delete this one" in caught.value.hint


def test_a_folder_that_another_process_writes_to_is_refused(make, tmp_path):
    (tmp_path / "logits").mkdir()
    with owning(tmp_path / "logits"), pytest.raises(OutputError, match="another process writes"):
        make().fill(CPU, ignore)


def test_missing_and_damaged_files_are_named(make):
    store = make()
    store.fill(CPU, ignore)
    path = store.folder / "logits-00001.arrow"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(PlanError, match="are damaged"):
        store.open()
    path.unlink()
    with pytest.raises(PlanError, match="logits-00001"):
        store.open()


def test_no_damaged_byte_becomes_a_token_outside_the_vocabulary(make):
    store = make()
    store.fill(CPU, ignore)
    path = store.folder / "logits-00000.arrow"
    content, generator = path.read_bytes(), np.random.default_rng(0)
    for place in generator.integers(0, len(content), 60):
        damaged = bytearray(content)
        damaged[place] ^= 0xFF
        path.write_bytes(bytes(damaged))
        try:
            found = store.open().targets(torch.tensor([0, 1]), ids()[:2])
        except PlanError:
            continue
        assert int(found.tokens_BTP.min()) >= 0
        assert int(found.tokens_BTP.max()) < V
