"""Files of teacher's logits: one compressed batch of an Arrow file per sequence, so that each can be read alone.

L tokens of a sequence, P tokens kept at each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from hcsmoe_hub.checkpoint.durable import write_file
from hcsmoe_hub.methods.distil.top_k import TopK

# Indices of a smaller vocabulary take two bytes.
_SHORT = 1 << 16
_VALUES, _TOKENS, _REST, _WARM_REST = "values", "tokens", "rest", "warm_rest"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsShape:
    """What every sequence of a file has.

    Attributes:
        length: L.
        count: P.
        vocab_size: Ids of tokens are below this.
    """

    length: int
    count: int
    vocab_size: int

    @property
    def token_dtype(self) -> np.dtype[Any]:
        """How ids are stored."""
        return np.dtype(np.uint16 if self.vocab_size <= _SHORT else np.uint32)

    @property
    def bytes(self) -> int:
        """Of one sequence, before it is compressed."""
        return self.length * (self.count * (2 + self.token_dtype.itemsize) + 2 * 4)

    @property
    def schema(self) -> pa.Schema:
        """The columns of a file: a row per token."""
        ids = pa.from_numpy_dtype(self.token_dtype)
        return pa.schema(
            {
                _VALUES: pa.list_(pa.float16(), self.count),
                _TOKENS: pa.list_(ids, self.count),
                _REST: pa.float32(),
                _WARM_REST: pa.float32(),
            }
        )


def write_logits(path: Path, sequences: Sequence[TopK], shape: LogitsShape) -> None:
    """Writes a file such that it is complete and on the disk when it has its name.

    Args:
        path: Its name.
        sequences: One ``TopK`` each: ``[L, P]`` and ``[L]``, on the CPU.
        shape: What they have in common.

    Raises:
        OSError: If the disk fails.
    """

    def fill(file: BinaryIO) -> None:
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_file(file, shape.schema, options=options) as writer:
            for kept in sequences:
                writer.write_batch(_batch(kept, shape))

    write_file(path, fill)


def _batch(kept: TopK, shape: LogitsShape) -> pa.RecordBatch:
    values = pa.array(kept.values.half().numpy().ravel())
    tokens = pa.array(kept.tokens.numpy().astype(shape.token_dtype).ravel())
    columns = [
        *(pa.FixedSizeListArray.from_arrays(flat, shape.count) for flat in (values, tokens)),
        *(pa.array(rest.float().numpy()) for rest in (kept.rest, kept.warm_rest)),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=shape.schema)


class LogitsFile:
    """Reads sequences of a file in any order.

    Args:
        path: The file.
        sequences: How many it must hold.
        shape: What they must have.

    Raises:
        ValueError: If it holds anything else.
        OSError: If it cannot be read.
    """

    def __init__(self, path: Path, sequences: int, shape: LogitsShape) -> None:
        self._shape = shape
        # Arrow's own errors are ValueErrors and OSErrors as well.
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if self._reader.schema != shape.schema:
            raise ValueError("its columns are others")
        if self._reader.num_record_batches != sequences:
            raise ValueError(f"it holds {self._reader.num_record_batches} sequences, not {sequences}")

    def read(self, number: int) -> TopK:
        """Reads one sequence: values in float16.

        Args:
            number: Its place in the file, from 0.

        Raises:
            ValueError: If it is damaged.
            OSError: If it cannot be read.
        """
        batch, shape = self._reader.get_batch(number), self._shape
        batch.validate(full=True)
        if batch.num_rows != shape.length or any(column.null_count for column in batch.columns):
            raise ValueError(f"sequence {number} does not hold {shape.length} tokens")
        values, ids = (batch.column(name).flatten().to_numpy(zero_copy_only=False) for name in (_VALUES, _TOKENS))
        tokens = torch.from_numpy(ids.astype(np.int64)).view(shape.length, shape.count)
        if int(tokens.max()) >= shape.vocab_size:
            raise ValueError(f"sequence {number} holds the token id {int(tokens.max())}")
        return TopK(
            values=torch.from_numpy(values.copy()).view(shape.length, shape.count),
            tokens=tokens,
            rest=self._column(batch, _REST),
            warm_rest=self._column(batch, _WARM_REST),
        )

    def _column(self, batch: pa.RecordBatch, name: str) -> Tensor:
        return torch.from_numpy(batch.column(name).to_numpy(zero_copy_only=False).copy())
