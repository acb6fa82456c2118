"""Token ids from a file: used as they are, refused where they cannot be, and their fingerprint."""

import hashlib
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibration_text import VOCABULARY, Load, load_token_ids, plan, refusal, save

from hcsmoe_hub.calibration.plan import plan_calibration
from hcsmoe_hub.calibration.token_ids import fingerprint
from hcsmoe_hub.options import CalibrationOptions

pytestmark = pytest.mark.usefixtures("no_network", "short_wait")


# Files


@pytest.mark.parametrize("order", ["C", "F"])
def test_token_ids_are_used_as_they_are(load: Load, tmp_path: Path, order: Any) -> None:
    array = np.random.default_rng(0).integers(0, VOCABULARY, (5, 7))
    file = save(tmp_path / "ids.npy", np.array(array, order=order))
    # Samples, length and seed are those of the file.
    found = load(file, samples=2, sequence_length=3, seed=9)
    assert found.tolist() == array.tolist()
    assert found.dtype == torch.int64


def test_the_plan_of_token_ids_has_the_size_of_the_file(tmp_path: Path) -> None:
    found = plan(save(tmp_path / "ids.npy", np.zeros((5, 7), dtype=np.int64)))
    assert (found.sequences, found.sequence_length, found.tokens, found.is_token_ids) == (5, 7, 35, True)


def test_token_ids_need_no_tokenizer(tmp_path: Path) -> None:
    options = CalibrationOptions(dataset=str(save(tmp_path / "ids.npy", [[5, 6, 7]])))
    chosen = plan_calibration(options, max_positions=None, has_tokenizer=False, label="org/model", fits=False)
    assert load_token_ids(chosen, tokenizer_folder=tmp_path, vocab_size=8).tolist() == [[5, 6, 7]]


@pytest.mark.parametrize("dtype", ["int32", "float64", ">i8", "U3"])
def test_token_ids_of_another_dtype_are_refused(tmp_path: Path, dtype: str) -> None:
    file = save(tmp_path / "ids.npy", np.ones((2, 3), dtype=dtype))
    error = refusal(lambda: plan(file))
    assert f"holds {np.dtype(dtype)} values of shape [2, 3]" in error.message
    assert "int64" in error.hint


@pytest.mark.parametrize("shape", [(6,), (1, 2, 3), (0, 4), (4, 0), ()])
def test_token_ids_of_another_shape_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    file = save(tmp_path / "ids.npy", np.zeros(shape, dtype=np.int64))
    error = refusal(lambda: plan(file))
    assert str(file) in error.message
    assert "[sequences, length]" in error.hint


class Trap:
    """A pickle that leaves a trace when it is opened."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.trace,)


def test_pickled_objects_are_refused_and_never_opened(tmp_path: Path) -> None:
    trace = tmp_path / "opened"
    array = np.empty((1, 1), dtype=object)
    array[0, 0] = Trap(trace)
    objects, plain = save(tmp_path / "objects.npy", array), tmp_path / "plain.npy"
    plain.write_bytes(pickle.dumps(Trap(trace)))
    for file in (objects, plain):
        assert "is not an array of numbers" in refusal(lambda file=file: plan(file)).message
    assert not trace.exists()
    np.load(objects, allow_pickle=True)
    assert trace.exists(), "the trap itself must work"


@pytest.mark.parametrize("cut", [0, 5, 60, 140])
def test_a_file_of_token_ids_that_ends_early_is_refused(tmp_path: Path, cut: int) -> None:
    file = save(tmp_path / "ids.npy", np.zeros((4, 4), dtype=np.int64))
    file.write_bytes(file.read_bytes()[:cut])
    assert "is not an array of numbers" in refusal(lambda: plan(file)).message


@pytest.mark.parametrize("damage", ["archive", "no archive", "header"])
def test_a_file_of_another_format_with_the_suffix_of_token_ids_is_refused(tmp_path: Path, damage: str) -> None:
    file = save(tmp_path / "ids.npy", np.zeros((4, 4), dtype=np.int64))
    match damage:
        case "archive":
            with file.open("wb") as target:
                np.savez(target, ids=np.zeros((4, 4), dtype=np.int64))
        case "no archive":
            file.write_bytes(b"PK\x03\x04 and nothing more")
        case "header":
            file.write_bytes(file.read_bytes().replace(b"{'descr'", b"(" * 8))
    assert str(file) in refusal(lambda: plan(file)).message


@pytest.mark.parametrize(("lowest", "highest"), [(-1, 5), (0, VOCABULARY)])
def test_token_ids_outside_the_vocabulary_are_refused(load: Load, tmp_path: Path, lowest: int, highest: int) -> None:
    file = save(tmp_path / "ids.npy", [[lowest, 3, highest]])
    error = refusal(lambda: load(file))
    assert f"from {lowest} to {highest}" in error.message
    assert f"ends at {VOCABULARY - 1}" in error.message


def test_the_last_id_of_the_vocabulary_is_accepted(load: Load, tmp_path: Path) -> None:
    assert load(save(tmp_path / "ids.npy", [[0, VOCABULARY - 1]])).tolist() == [[0, VOCABULARY - 1]]


def test_a_missing_file_of_token_ids_is_refused(tmp_path: Path) -> None:
    assert f"there is no calibration file {tmp_path / 'ids.npy'}" in refusal(lambda: plan(tmp_path / "ids.npy")).message


# The fingerprint


def test_the_fingerprint_is_the_hash_of_little_endian_int64_row_by_row() -> None:
    token_ids = torch.tensor([[0, 1, 2], [3, 4, 2**40]])
    expected = hashlib.sha256(struct.pack("<6q", 0, 1, 2, 3, 4, 2**40)).hexdigest()
    assert fingerprint(token_ids) == expected
    # A stored value, so that reports of different versions can be compared.
    assert expected == "0ece52069cc0b0aedfd12072074c4f17cda0bd82af1b32923698edafd7f40bfb"


def test_the_fingerprint_follows_the_order_of_the_ids_and_not_of_the_memory() -> None:
    token_ids = torch.arange(6).view(2, 3)
    assert fingerprint(token_ids.T) == fingerprint(token_ids.T.contiguous())
    assert fingerprint(token_ids.T) != fingerprint(token_ids)
