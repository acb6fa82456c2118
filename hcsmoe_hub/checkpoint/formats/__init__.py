"""How numbers are stored: tensors as they are, or as codes and scales of a quantised format."""

from hcsmoe_hub.checkpoint.formats.logical import Codec, LogicalTensor
from hcsmoe_hub.checkpoint.formats.read import logical_tensors

__all__ = ["Codec", "LogicalTensor", "logical_tensors"]
