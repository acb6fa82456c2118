"""Writes shards together with other ranks: each writes some of the tensors, and the first hands on whole shards."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from hcsmoe_hub.checkpoint.tensors import StoredTensor
from hcsmoe_hub.checkpoint.writer import Recipient, ShardLayout, ShardWriter
from hcsmoe_hub.machine import ranks


class SharedWriter(ShardWriter):
    """A writer whose folder other ranks write to as well, each to positions of its own.

    Args:
        folder: Folder of the shards, the same for all ranks.
        layout: Position of every tensor.
        recipient: Receives the finished shards; of the first rank only.
    """

    def __init__(
        self, folder: Path, layout: ShardLayout, recipient: Recipient | None = None, *, keeps_digests: bool = False
    ) -> None:
        super().__init__(folder, layout, recipient, keeps_digests=keeps_digests)
        self._written: list[str] = []

    def _check(self, names: Sequence[str], digests: Mapping[str, str]) -> None:
        # Each rank reads a part; all of them fail together.
        super_check, own = super()._check, names[ranks.block(len(names))]
        ranks.alike(lambda: super_check(own, digests))

    def _note(self, written: StoredTensor) -> None:
        self._written.append(written.name)

    def share(self) -> None:
        """Lets the other ranks know what has been written here, and hands on shards that are complete.

        All ranks call it as often as each other.
        """
        with self._lock:
            own, self._written = self._written, []
        complete = []
        for name in (name for names in ranks.every(own) for name in names):
            planned = self._tensors[name]
            self.bytes_written += planned.nbytes
            self._missing[planned.shard].remove(name)
            if not self._missing[planned.shard]:
                complete.append(planned.shard)
        if not complete:
            return
        with self._lock:
            for shard in complete:
                if shard in self._files:
                    self._close(shard)
        # All parts are on the disk before a shard is handed on.
        ranks.every(None)
        if ranks.is_first():
            for shard in complete:
                self._publish(shard)
