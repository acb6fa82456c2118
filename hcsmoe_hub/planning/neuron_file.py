"""The file next to the weights that lists where the neurons of a result come from.

A zip file of numpy arrays, two for each layer in which experts are made of whole neurons: ``3.expert`` and ``3.neuron``
for layer 3, unsigned integers ``[C, I]`` of its C experts with I neurons each. It may come from anywhere: what it
holds is checked against the report before it is used, and its size before it is read.
"""

import io
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from hcsmoe_hub.methods.merging import FIRST_EXPERT, NeuronOrigins
from hcsmoe_hub.options import AlignTo
from hcsmoe_hub.report import ConversionReport, LayerReport, NeuronRecord

# More than the header of an array takes.
HEADER_BYTES = 1024
_PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# What the libraries raise for files that are not of the format, besides ValueError.
_BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    tokenize.TokenError,
)
_TYPES = tuple(np.dtype(kind) for kind in ("u1", "<u2", "<u4"))


def neuron_file(origins: Mapping[int, NeuronOrigins]) -> bytes:
    """The content of the file, the same bytes for the same neurons.

    Args:
        origins: By decoder layer.
    """
    arrays = {}
    for layer, found in sorted(origins.items()):
        arrays[f"{layer}.expert"], arrays[f"{layer}.neuron"] = found.expert_CI, found.neuron_CI
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    return content.getvalue()


def describe_neurons(content: bytes, *, before: int, after: int) -> NeuronRecord:
    """What the report says of the file.

    Args:
        content: Its bytes.
        before: Neurons of an expert of the source.
        after: Neurons of an expert of the result.
    """
    return {"before": before, "after": after, "sha256": sha256(content).hexdigest(), "bytes": len(content)}


def read_neuron_file(content: bytes, record: NeuronRecord, report: ConversionReport) -> dict[int, NeuronOrigins]:
    """Reads the file.

    Args:
        content: Its bytes.
        record: What the report says of it; the caller has compared its numbers of neurons with a model.
        report: The report.

    Returns:
        Where the neurons come from, by decoder layer.

    Raises:
        ValueError: If the file is not the one that the report lists, or does not fit the layers.
    """
    if sha256(content).hexdigest() != record["sha256"]:
        raise ValueError("it is not the file whose digest hcsmoe.json lists")
    if not 0 < record["after"] <= record["before"]:
        raise ValueError(f"hcsmoe.json says that experts of {record['before']} neurons keep {record['after']}")
    by_layer = {str(layer.layer): layer for layer in report.layers}
    anchor = FIRST_EXPERT if report.method.get("align_to") == AlignTo.FIRST else None
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            found = {name.rpartition(".")[0] for name in _names(archive)}
            if unknown := sorted(found - by_layer.keys()):
                raise ValueError(f"it lists neurons of layer {unknown[0]}, which hcsmoe.json does not have")
            return {int(name): _origins(archive, by_layer[name], record, anchor) for name in found}
    except _BROKEN as error:
        raise ValueError(f"it is not a zip file of arrays ({error})") from error


def _names(archive: zipfile.ZipFile) -> list[str]:
    """Names of its arrays, two for every layer.

    Raises:
        ValueError: If there are others.
    """
    names = sorted(name.removesuffix(".npy") for name in archive.namelist())
    layers = {name.rpartition(".")[0] for name in names}
    if names != sorted(f"{layer}.{what}" for layer in layers for what in ("expert", "neuron")):
        raise ValueError("it does not hold one array of experts and one of neurons for every layer")
    return names


def _origins(archive: zipfile.ZipFile, layer: LayerReport, record: NeuronRecord, anchor: int | None) -> NeuronOrigins:
    """The neurons of one layer.

    Args:
        archive: The file.
        layer: The layer.
        record: What the report says of the file.
        anchor: The expert whose order of neurons all merged experts have, if it need not be of their clusters.

    Raises:
        ValueError: If the arrays do not fit the layer.
    """
    shape = (layer.experts, record["after"])
    expert_CI, neuron_CI = (_read(archive, f"{layer.layer}.{what}", shape) for what in ("expert", "neuron"))
    where = f"the neurons of layer {layer.layer}"
    label_E = np.asarray(layer.labels)
    if expert_CI.max(initial=0) >= len(label_E) or neuron_CI.max(initial=0) >= record["before"]:
        raise ValueError(f"{where} name an expert or a neuron that the source does not have")
    is_foreign = label_E[expert_CI] != np.arange(layer.experts)[:, None]
    if anchor is not None:
        is_foreign &= expert_CI != anchor
    if is_foreign.any():
        raise ValueError(f"{where} come from experts of other clusters")
    place_CI = np.sort(expert_CI.astype(np.int64) * record["before"] + neuron_CI, axis=1)
    if (np.diff(place_CI, axis=1) == 0).any():
        raise ValueError(f"{where} name one neuron twice")
    return NeuronOrigins(expert_CI=expert_CI, neuron_CI=neuron_CI)


def _read(archive: zipfile.ZipFile, name: str, shape: tuple[int, int]) -> NDArray[Any]:
    """An array whose header is checked before memory for it is taken.

    Raises:
        ValueError: If it has another shape, or holds no unsigned integers.
    """
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type not in _PACKED:
        raise ValueError(f"its array {name} is compressed in another way than numpy does")
    if info.file_size > HEADER_BYTES + max(kind.itemsize for kind in _TYPES) * shape[0] * shape[1]:
        raise ValueError(f"its array {name} has {info.file_size} bytes, more than {shape[0]} x {shape[1]} numbers")
    content = io.BytesIO(archive.read(info))
    if npy.read_magic(content) != (1, 0):
        raise ValueError(f"its array {name} is of another version of the format")
    found, is_fortran, kind = npy.read_array_header_1_0(content)
    if found != shape or is_fortran or kind not in _TYPES:
        raise ValueError(f"its array {name} is {kind} {list(found)}, not unsigned integers {list(shape)}")
    numbers = np.frombuffer(content.read(), dtype=kind)
    if len(numbers) != shape[0] * shape[1]:
        raise ValueError(f"its array {name} has {len(numbers)} numbers, not {shape[0]} x {shape[1]}")
    return numbers.reshape(shape)
