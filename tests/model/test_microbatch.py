"""Layers run in micro-batches: any size gives the same result, and sizes that do not fit are halved."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import LENGTH, SEQUENCES, build, contents, options, read_tensors, token_ids
from torch import Tensor

from hcsmoe_hub import convert
from hcsmoe_hub import plan as plan_conversion
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.model.microbatch import MicroBatcher, Uncut, bare, select
from hcsmoe_hub.pipeline.stream import make_batcher
from hcsmoe_hub.report import ConversionReport

CPU = torch.device("cpu")
# As torch words it on an accelerator, and on the CPU.
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.18 GiB."
OUT_OF_HOST_MEMORY = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"


class Shared:
    """An object that layers hand on and change."""


# Cutting and joining


def test_select_cuts_tensors_whose_first_dimension_is_the_batch() -> None:
    value = torch.arange(12).view(4, 3)
    assert torch.equal(select(value, slice(1, 3), 4), value[1:3])


@pytest.mark.parametrize("value", [torch.zeros(1, 4), torch.zeros(5), torch.tensor(4.0), 4, None, "text"], ids=repr)
def test_select_passes_everything_else_on(value: object) -> None:
    assert select(value, slice(0, 2), 4) is value


def test_select_looks_into_nested_tuples_lists_and_dicts() -> None:
    batch, mask = torch.arange(4), torch.zeros(1, 9)
    cut = select({"a": (batch, [batch, mask]), "b": {"c": batch}, "d": None}, slice(0, 2), 4)
    assert torch.equal(cut["a"][0], batch[:2])
    assert torch.equal(cut["a"][1][0], batch[:2])
    assert cut["a"][1][1] is mask
    assert torch.equal(cut["b"]["c"], batch[:2])
    assert (type(cut["a"]), type(cut["a"][1]), cut["d"]) == (tuple, list, None)


def test_select_passes_a_shared_object_on_by_identity() -> None:
    shared = Shared()
    cut = select((shared, {"cache": shared}), slice(0, 2), 4)
    assert cut[0] is shared
    assert cut[1]["cache"] is shared


def test_what_is_not_cut_but_as_long_as_what_is_cut_stays_whole_in_smaller_pieces() -> None:
    # Eight sequences of four tokens each: after a cut to four, nobody could tell which is which.
    states, positions = torch.arange(8), torch.arange(4)
    cut = select((states, {"positions": positions}), slice(0, 4), 8)
    assert isinstance(cut[1]["positions"], Uncut)
    smaller = bare(select(cut, slice(0, 2), 4))
    assert torch.equal(smaller[0], states[:2])
    assert smaller[1]["positions"] is positions


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: (t, None),
        lambda t: [t, (t + 1, 7)],
        lambda t: {"states": t},
        lambda t: (t, t.flatten()),
    ],
    ids=["tensor", "tuple", "list", "dict", "an entry per token"],
)
def test_what_micro_batches_return_is_put_together(size: int, wrap: Callable[[Tensor], Any]) -> None:
    value = torch.arange(14).view(7, 2)
    found = MicroBatcher(7, size, CPU).wrap(wrap, lambda: None)(value)
    assert repr(found) == repr(wrap(value))


# Halving


class Layer:
    """Doubles its input, and runs out of memory on more than ``limit`` sequences."""

    def __init__(self, limit: int, message: str = OUT_OF_MEMORY) -> None:
        self.limit = limit
        self.message = message
        self.seen: list[int] = []
        self.attempts = 0

    def start(self) -> None:
        self.attempts += 1

    def __call__(self, states: Tensor, *, mask: Tensor) -> tuple[Tensor, None]:
        assert mask.shape == (1, 3)
        self.seen.append(len(states))
        if len(states) > self.limit:
            raise RuntimeError(self.message)
        return 2 * states, None


def run(batcher: MicroBatcher, layer: Layer) -> Tensor:
    """The output of a layer over all sequences."""
    states = torch.arange(3 * batcher.sequences).view(-1, 3)
    output, nothing = batcher.wrap(layer, layer.start)(states, mask=torch.ones(1, 3))
    assert nothing is None
    assert torch.equal(output, 2 * states)
    return output


def test_a_size_that_fits_is_kept() -> None:
    batcher, layer = MicroBatcher(7, 3, CPU), Layer(limit=3)
    run(batcher, layer)
    assert (layer.seen, layer.attempts, batcher.batch) == ([3, 3, 1], 1, 3)


@pytest.mark.parametrize("message", [OUT_OF_MEMORY, OUT_OF_HOST_MEMORY])
def test_a_size_that_does_not_fit_is_halved_until_it_does(message: str) -> None:
    batcher, layer = MicroBatcher(9, 8, CPU), Layer(limit=2, message=message)
    run(batcher, layer)
    assert (layer.seen, layer.attempts, batcher.batch) == ([8, 4, 2, 2, 2, 2, 1], 3, 2)


def test_a_failure_in_a_later_micro_batch_starts_over() -> None:
    batcher = MicroBatcher(4, 2, CPU)
    seen: list[int] = []
    attempts: list[int] = []

    def fails_once(states: Tensor) -> Tensor:
        seen.append(len(states))
        if len(seen) == 2:
            raise RuntimeError(OUT_OF_MEMORY)
        return 2 * states

    states = torch.arange(12).view(4, 3)
    output = batcher.wrap(fails_once, lambda: attempts.append(len(seen)))(states)
    assert (seen, attempts) == ([2, 2, 1, 1, 1, 1], [0, 2])
    assert torch.equal(output, 2 * states)


def test_the_next_layer_begins_with_the_size_that_fitted() -> None:
    batcher, first, second = MicroBatcher(8, 8, CPU), Layer(limit=2), Layer(limit=8)
    run(batcher, first)
    run(batcher, second)
    assert (second.seen, second.attempts) == ([2, 2, 2, 2], 1)


def test_one_sequence_that_does_not_fit_ends_with_what_to_do() -> None:
    batcher, layer = MicroBatcher(4, 4, CPU), Layer(limit=0)
    with pytest.raises(PlanError) as caught:
        run(batcher, layer)
    assert layer.seen == [4, 2, 1]
    assert "one calibration sequence does not fit into memory" in caught.value.message
    assert "`sequence_length`" in caught.value.hint


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError(OUT_OF_MEMORY)])
def test_another_failure_is_not_taken_for_a_lack_of_memory(error: Exception) -> None:
    batcher, attempts = MicroBatcher(4, 4, CPU), []

    def fails(states: Tensor) -> Tensor:
        raise error

    with pytest.raises(type(error)) as caught:
        batcher.wrap(fails, lambda: attempts.append(1))(torch.zeros(4, 3))
    assert caught.value is error
    assert (attempts, batcher.batch) == ([1], 4)


# The size to begin with


@pytest.mark.parametrize(
    ("batch_tokens", "batch"),
    [(1, 1), (LENGTH, 1), (2 * LENGTH - 1, 1), (3 * LENGTH, 3), (SEQUENCES * LENGTH, 4), (10**6, 4)],
)
def test_a_micro_batch_holds_whole_sequences_of_at_most_so_many_tokens(
    tmp_path: Path, batch_tokens: int, batch: int
) -> None:
    source = build(tmp_path / "model")
    skeleton = plan_conversion(source, options(source, 4)).model.skeleton
    assert make_batcher(skeleton, token_ids(), batch_tokens=batch_tokens, device=CPU).batch == batch


def test_as_many_sequences_as_tokens_in_each_are_cut_like_any_other_set(tmp_path: Path) -> None:
    source = build(tmp_path / "model")
    skeleton = plan_conversion(source, options(source, 4)).model.skeleton
    assert make_batcher(skeleton, token_ids(8, 8), batch_tokens=8, device=CPU).batch == 1


# Whole conversions


def convert_in(source: Path, batch_tokens: int, *, ids: Tensor | None = None) -> tuple[ConversionReport, Path]:
    """Converts with a size of micro-batches; returns the report and the result."""
    result = source.parent / f"in-{batch_tokens}"
    return convert(source, options(source, 4, ids=ids, output=result, batch_tokens=batch_tokens)), result


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_every_size_of_micro_batches_gives_the_same_result(tmp_path: Path, model_type: str) -> None:
    source = build(tmp_path / "model", model_type)
    ids = token_ids(5)
    (report, folder), *others = [convert_in(source, size * LENGTH, ids=ids) for size in (5, 3, 2, 1)]
    whole = read_tensors(folder)
    for other_report, other_folder in others:
        for layer, other in zip(report.layers, other_report.layers, strict=True):
            assert (other.labels, other.dominant, other.usage) == (layer.labels, layer.dominant, layer.usage)
            assert other.merge_heights == pytest.approx(layer.merge_heights, rel=1e-4)
            assert other.saliency == pytest.approx(layer.saliency, rel=1e-4)
            assert other.output_error == pytest.approx(layer.output_error, rel=1e-4)
        for name, tensor in read_tensors(other_folder).items():
            torch.testing.assert_close(tensor, whole[name], rtol=1e-6, atol=1e-6)


def test_as_many_sequences_as_tokens_give_the_result_of_the_whole(tmp_path: Path) -> None:
    source = build(tmp_path / "model")
    ids = token_ids(6, 6)
    small, large = (convert_in(source, size, ids=ids)[1] for size in (6, 36))
    assert contents(small)["model.safetensors"] == contents(large)["model.safetensors"]


def limit_memory(monkeypatch: pytest.MonkeyPatch, sequences: int) -> list[int]:
    """Lets every layer run out of memory above so many sequences, after it has computed; returns the sizes it saw."""
    seen: list[int] = []
    wrap = MicroBatcher.wrap

    def limited_wrap(
        self: MicroBatcher, forward: Callable[..., Any], on_attempt: Callable[[], None]
    ) -> Callable[..., Any]:
        def limited(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append(len(hidden))
            output = forward(hidden, *args, **kwargs)
            # The last moment is the worst: the statistics of this micro-batch have been counted already.
            if len(hidden) > sequences:
                raise RuntimeError(OUT_OF_MEMORY)
            return output

        return wrap(self, limited, on_attempt)

    monkeypatch.setattr(MicroBatcher, "wrap", limited_wrap)
    return seen


def test_a_conversion_that_runs_out_of_memory_ends_in_the_result_of_the_smaller_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build(tmp_path / "model")
    expected, small = convert_in(source, 2 * LENGTH)
    seen = limit_memory(monkeypatch, 2)
    found, large = convert_in(source, SEQUENCES * LENGTH)
    # The first layer fails on all four, the second begins with what fitted.
    assert seen == [4, 2, 2, 2, 2]
    assert [sum(layer.usage) for layer in found.layers] == [SEQUENCES * LENGTH * 2] * 2
    assert found.layers == expected.layers
    files = contents(large)
    assert all(
        files[name] == content for name, content in contents(small).items() if name not in ("hcsmoe.json", "README.md")
    )


def test_a_conversion_whose_sequences_do_not_fit_one_by_one_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build(tmp_path / "model")
    seen = limit_memory(monkeypatch, 0)
    with pytest.raises(PlanError, match="one calibration sequence does not fit"):
        convert_in(source, SEQUENCES * LENGTH)
    assert seen == [4, 2, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.npy", "model"]


def test_the_report_counts_every_token_once_however_the_batch_is_cut(tmp_path: Path) -> None:
    source = build(tmp_path / "model")
    _, result = convert_in(source, 3 * LENGTH)
    layers = json.loads((result / "hcsmoe.json").read_text())["layers"]
    assert [sum(layer["usage"]) for layer in layers] == [SEQUENCES * LENGTH * 2] * 2
