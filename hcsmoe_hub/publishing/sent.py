"""What is kept of a shard that was uploaded and deleted: a later run commits it without having its content."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from hcsmoe_hub.checkpoint.tensors import StoredTensor, stored_tensors
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.pipeline.progress import SENT, Progress
from hcsmoe_hub.planning.conversion_plan import ConversionPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class SentShard:
    """A shard of which a repository has the content.

    Attributes:
        shard: Its name.
        repo_id: The repository.
        size: Its size in bytes.
        sha256: Hash of its content, in hexadecimal.
        sample: Its first bytes, by which the Hub says how a file is stored.
        header: Its header, without the length before it.
        data_start: Position of the first byte of a tensor.
    """

    shard: str
    repo_id: str
    size: int
    sha256: str
    sample: bytes
    header: Mapping[str, Any]
    data_start: int

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """Its tensors by name."""
        return stored_tensors(self.header, shard=self.shard, data_start=self.data_start, file_bytes=self.size)

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        content = {name: getattr(self, name) for name in self.__slots__}
        return {**content, "sample": base64.b64encode(self.sample).decode(), "header": dict(self.header)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """What ``as_dict`` has returned, among other entries."""
        found = {name: content[name] for name in cls.__slots__}
        return cls(**{**found, "sample": base64.b64decode(found["sample"])})


class SentLog(Protocol):
    """Keeps records of shards for later runs."""

    def note_sent(self, record: SentShard) -> None:
        """Keeps a record; when this returns, it is on the disk."""
        ...

    def sent(self) -> Sequence[SentShard]:
        """The records that were kept."""
        ...


class KeptShards:
    """Records of shards among what is kept of a conversion.

    Args:
        progress: What is kept; opened by all ranks, and used by the first one alone.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._found = [SentShard.from_dict(line) for line in progress.lines(SENT)]

    def note_sent(self, record: SentShard) -> None:
        """Keeps a record; when this returns, it is on the disk."""
        self._progress.append(SENT, **record.as_dict())

    def sent(self) -> Sequence[SentShard]:
        """The records of an interrupted conversion."""
        return self._found


def check_sent(plan: ConversionPlan, records: Sequence[SentShard]) -> None:
    """Checks that a conversion can go on from shards that an interrupted one has sent away.

    Args:
        plan: The conversion.
        records: These shards.

    Raises:
        PlanError: If it pushes its result to another repository, or wants to keep it.
    """
    if not records:
        return
    push, repo_id = plan.options.push, records[0].repo_id
    if plan.sends_away and push is not None and push.repo_id == repo_id:
        return
    count = "1 shard" if len(records) == 1 else f"{len(records)} shards"
    verb = "was" if len(records) == 1 else "were"
    raise PlanError(
        f"{count} of the interrupted conversion {verb} sent to {repo_id} and deleted here, so the result can only be "
        "completed there.",
        hint=f"push to {repo_id} with `low_disk=True`, or begin anew with `restart=True`",
        option="push",
    )
