"""A teacher that is not in memory: what was kept of its logits is read as it is needed.

B sequences of a batch, L tokens each, T of them with logits, P of which are kept.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.methods.distil.top_k import TopK
from hcsmoe_hub.recovery.logits_file import LogitsFile
from hcsmoe_hub.recovery.teacher import TopLogits


class StoredTeacher:
    """A teacher whose logits are in files.

    Args:
        folder: Where they are, for messages.
        files: The files, in the order of the sequences.
        per_file: Sequences in each but the last.
    """

    def __init__(self, folder: Path, files: Sequence[LogitsFile], per_file: int) -> None:
        self._folder = folder
        self._files = files
        self._per_file = per_file

    def targets(self, numbers_B: Tensor, ids_BL: Tensor) -> TopLogits:
        """What was kept for a batch, on the device of its token ids.

        Args:
            numbers_B: Numbers of the sequences, ``[B]`` int64.
            ids_BL: Their token ids, ``[B, L]`` int64; only their device is looked at.

        Returns:
            Values in float16.

        Raises:
            PlanError: If a file is damaged.
        """
        with naming_damage(self._folder):
            rows = [self._read(number) for number in numbers_B.tolist()]
        fields = zip(*((row.values, row.tokens, row.rest, row.warm_rest) for row in rows), strict=True)
        # Autocast on the host refuses to stack float16.
        with torch.autocast("cpu", enabled=False):
            columns = [torch.stack(column).to(ids_BL.device) for column in fields]
        values_BTP, tokens_BTP, rest_BT, warm_rest_BT = columns
        return TopLogits(values_BTP=values_BTP, tokens_BTP=tokens_BTP, rest_BT=rest_BT, warm_rest_BT=warm_rest_BT)

    def _read(self, sequence: int) -> TopK:
        file, place = divmod(sequence, self._per_file)
        return self._files[file].read(place)


@contextmanager
def naming_damage(folder: Path) -> Iterator[None]:
    """Turns what is wrong with a file inside a ``with`` block into a message.

    Raises:
        PlanError: If something is.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise PlanError(
            f"the teacher's logits in {folder} are damaged: {error}.",
            hint="delete the folder, and run the same command again",
        ) from error
