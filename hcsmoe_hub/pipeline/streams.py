"""The sets of hidden states that one forward of the model carries along, one below the other in its batch.

B calibration sequences and M held-out ones, of S tokens each.
"""

from collections.abc import Collection, Set
from enum import Enum

from torch import Tensor

from hcsmoe_hub.pipeline.rows import Rows


class Part(Enum):
    """The sets of hidden states, in the order of the batch."""

    SOURCE = "calibration sequences in the source"
    MEASURED = "held-out sequences in the source"
    REDUCED = "calibration sequences in the reduced model"
    MEASURED_REDUCED = "held-out sequences in the reduced model"

    @property
    def is_measured(self) -> bool:
        """Whether nothing but the cost of the conversion is measured on it."""
        return self in (Part.MEASURED, Part.MEASURED_REDUCED)

    @property
    def is_reduced(self) -> bool:
        """Whether it runs through the layers of the result."""
        return self in (Part.REDUCED, Part.MEASURED_REDUCED)

    @property
    def original(self) -> "Part":
        """The same sequences in the source."""
        return Part.MEASURED if self.is_measured else Part.SOURCE


class Streams(Rows[Part]):
    """How the sets of hidden states of a conversion share the batch of the model's own forward.

    Args:
        token_ids: The calibration sequences, ``[B, S]`` int64; B may be 0.
        measured_ids: The held-out sequences, ``[M, S]`` int64; M may be 0.
        doubles: Whether the calibration sequences run through the reduced model as well; held-out ones always do.
        lengths: Tokens per sequence in any of the layers.
        recalled: Sets that do not run, as an earlier run has kept what is needed of them.

    Attributes:
        measured_ids: The held-out sequences.
    """

    def __init__(
        self,
        token_ids: Tensor,
        measured_ids: Tensor,
        *,
        doubles: bool,
        lengths: Set[int],
        recalled: Collection[Part] = (),
    ) -> None:
        self.measured_ids = measured_ids
        doubled_ids = token_ids if doubles else token_ids[:0]
        sets = dict(zip(Part, (token_ids, measured_ids, doubled_ids, measured_ids), strict=True))
        sets |= {part: sets[part][:0] for part in recalled}
        super().__init__(sets, lengths=lengths)

    def measured(self, hidden_RSH: Tensor) -> dict[Part, Tensor]:
        """The hidden states ``[M, S, H]`` of the sets that are measured.

        Args:
            hidden_RSH: Those of the whole batch.
        """
        return {part: hidden_RSH[rows].clone() for part, rows in self.places().items() if part.is_measured}
