"""Brings the weights of one decoder layer into the skeleton, and takes them away again."""

from collections.abc import Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hcsmoe_hub.checkpoint.formats import LogicalTensor
from hcsmoe_hub.checkpoint.lazy_tensor import LazyTensor, OnRead, read_into
from hcsmoe_hub.checkpoint.reader import TensorReader
from hcsmoe_hub.errors import SourceError
from hcsmoe_hub.machine.accelerator import HOST, is_host, release_unused
from hcsmoe_hub.machine.finite import are_finite
from hcsmoe_hub.machine.out_of_memory import is_out_of_memory, says_out_of_memory
from hcsmoe_hub.machine.transfer import Upload, empty_on_host
from hcsmoe_hub.model.in_place import Filled, filled_parameters
from hcsmoe_hub.model.skeleton import Broken, Group, Placement, Skeleton
from hcsmoe_hub.model.transformers_seam import load_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredForm:
    """What stays as it is stored, although the model runs in another dtype or elsewhere.

    Attributes:
        copies: Parameters of which a copy in their stored form is returned.
        experts: Parameters of experts that keep the dtype they are stored in: each expert is widened when it runs.
        experts_on_host: Whether these stay on the host from the start.
    """

    copies: Set[str] = frozenset()
    experts: Set[str] = frozenset()
    experts_on_host: bool = False


class LayerLoader:
    """Loads groups of tensors; each byte is read once, and the skeleton remembers which tensors are not finite.

    Experts are read to their places in the fused parameters. All other tensors go through transformers' own
    conversions. Tensors of a router are also kept as they are stored: the model may run them in another precision.

    Where a layer does not fit an accelerator next to the one at work, the next one waits for its turn; where it does
    not fit alone, its experts stay on the host.

    Args:
        skeleton: The model to fill.
        placement: Where its tensors belong.
        reader: Where weights come from.
        device: Where layers run; everything outside the layers stays on the CPU.
        stored: What stays as it is stored.
        on_read: Called with every tensor, before it is converted.

    Attributes:
        experts_on_host: Whether experts of the layers that are loaded from now on stay on the host.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        placement: Placement,
        reader: TensorReader,
        *,
        device: torch.device,
        stored: StoredForm = StoredForm(),
        on_read: OnRead = lambda tensor, parts, values: None,
    ) -> None:
        self._skeleton = skeleton
        self._groups = placement.groups
        self._tensors = placement.tensors
        self._reader = reader
        self._device = device
        self._copies = stored.copies
        self._experts = stored.experts
        self.experts_on_host = stored.experts_on_host
        self._on_read = on_read
        self._upload = Upload(device)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._pending: dict[int, Future[dict[str, Tensor] | None]] = {}

    def load(self, layer: int | None) -> dict[str, Tensor]:
        """Loads one group.

        Returns:
            The kept tensors as stored, by parameter name.

        Raises:
            SourceError: If transformers cannot place a tensor.
            torch.OutOfMemoryError: If the memory of the device has run out.
        """
        found = self._load(layer, can_wait=False)
        assert found is not None, "only a layer that is loaded ahead can wait"
        return found

    def _load(self, layer: int | None, *, can_wait: bool) -> dict[str, Tensor] | None:
        """Loads one group; ``None`` if it does not fit the device now, but may do so when nothing else is there."""
        group, device = self._groups.get(layer, Group()), HOST if layer is None else self._device
        filled = self._filled(layer)
        # Before anything is read: what has been read cannot be read again.
        memory = self._reserve(group, filled, device, can_wait=can_wait)
        if memory is None:
            return None
        originals: dict[str, Tensor] = {}

        def on_read(tensor: LogicalTensor, parts: Mapping[str, Tensor], values: Tensor) -> None:
            self._on_read(tensor, parts, values)
            target = group.targets[tensor.name]
            if not are_finite(values):
                broken = Broken(name=tensor.name, layer=layer, parameter=target)
                self._skeleton.broken[tensor.name] = broken
            if target in self._copies and tensor.name in group.renamed:
                originals[target] = values

        self._upload.begin()
        self._fill(filled, memory, on_read)
        self._convert(layer, group, device, filled=filled.keys(), on_read=on_read)
        self._upload.settle()
        if layer is not None and not is_host(device):
            self._bring(group, device)
            move_computed_buffers(self._skeleton.layers[layer], device)
        return originals

    def _reserve(
        self, group: Group, filled: Mapping[str, Filled], device: torch.device, *, can_wait: bool
    ) -> dict[str, Tensor] | None:
        """Memory for the parameters that are filled in place; ``None`` if a layer has to wait for it."""
        if is_host(device):
            return self._memory(filled, device)
        try:
            memory = self._memory(filled, device)
            # transformers holds parts of what it converts twice.
            torch.empty(2 * self._other_bytes(group, filled.keys()), dtype=torch.uint8, device=device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        else:
            return memory
        release_unused(device)
        if can_wait:
            return None
        # The other parameters of a layer are small; where even they do not fit, loading them says so.
        self.experts_on_host = True
        return self._memory(filled, device)

    def _memory(self, filled: Mapping[str, Filled], device: torch.device) -> dict[str, Tensor]:
        memory = {}
        for name, parameter in filled.items():
            shape = self._skeleton.state[name].shape
            if is_host(device):
                memory[name] = empty_on_host(shape, parameter.dtype)
            elif self._stays_on_host(name):
                memory[name] = self._upload.empty_on_host(shape, parameter.dtype)
            else:
                memory[name] = torch.empty(shape, dtype=parameter.dtype, device=device)
        return memory

    def _other_bytes(self, group: Group, filled: Set[str]) -> int:
        """Bytes of the parameters that transformers brings to the device."""
        others = (name for name in set(group.targets.values()) - filled if not self._stays_on_host(name))
        return sum(self._skeleton.state[name].nbytes for name in others)

    def _stays_on_host(self, parameter: str) -> bool:
        return self.experts_on_host and parameter in self._experts

    def _fill(self, filled: Mapping[str, Filled], memory: Mapping[str, Tensor], on_read: OnRead) -> None:
        """Reads the tensors of some parameters to their places."""
        for name, parameter in filled.items():
            for place in parameter.places:
                tensor = self._tensors[place.name]
                on_read(tensor, *read_into(tensor, self._reader, place.within(memory[name]), self._upload.copy))
            set_parameter(self._skeleton.module, name, memory[name])

    def _convert(
        self, layer: int | None, group: Group, device: torch.device, *, filled: Set[str], on_read: OnRead
    ) -> None:
        """Loads all other tensors of a group through transformers."""
        skeleton = self._skeleton
        names = [name for name, target in group.targets.items() if target not in filled]
        lazy = {skeleton.in_model(name): LazyTensor(self._tensors[name], self._reader, on_read) for name in names}
        experts = {group.targets[name]: self._tensors[name].dtype for name in names} if self._experts else {}
        experts = {name: dtype for name, dtype in experts.items() if name in self._experts}
        for name, dtype in experts.items():
            if dtype.is_floating_point:
                set_parameter(skeleton.module, name, skeleton.state[name].to(dtype))
        on_host = {name for name in experts if self._stays_on_host(name)}
        problems = load_weights(skeleton.module, lazy, skeleton.dtype, device=device, on_host=on_host)
        where = "outside the layers" if layer is None else f"of layer {layer}"
        # transformers only quotes the errors that it has met.
        if any(map(says_out_of_memory, problems)):
            raise torch.OutOfMemoryError(f"out of memory on {device} while loading the weights {where}")
        if problems:
            raise SourceError(
                f"transformers cannot load the weights {where}: {problems[0]}", hint="download the checkpoint again"
            )

    def _bring(self, group: Group, device: torch.device) -> None:
        """Brings to the device what is not there: transformers leaves some parameters on the host if memory runs out.

        Raises:
            torch.OutOfMemoryError: If they do not fit.
        """
        for name in set(group.targets.values()):
            owner, _, attribute = name.rpartition(".")
            value = getattr(self._skeleton.module.get_submodule(owner), attribute)
            if not value.is_meta and value.device != device and not self._stays_on_host(name):
                set_parameter(self._skeleton.module, name, value.to(device))

    def prefetch(self, layer: int) -> None:
        """Starts loading a decoder layer in the background."""
        if layer < len(self._skeleton.layers):
            self._pending[layer] = self._pool.submit(self._load, layer, can_wait=True)

    def take(self, layer: int) -> dict[str, Tensor]:
        """Waits for a decoder layer, loading it now if it was not prefetched."""
        pending = self._pending.pop(layer, None)
        found = None if pending is None else pending.result()
        return self.load(layer) if found is None else found

    def settle(self) -> None:
        """Waits for layers whose loading takes more memory than they do: that and merging would add up."""
        wait([task for layer, task in self._pending.items() if not self._is_in_place(layer)])

    def _is_in_place(self, layer: int) -> bool:
        """Whether loading a layer takes hardly more memory than the layer: all that is put together is filled."""
        group, filled = self._groups.get(layer, Group()), self._filled(layer)
        return all(group.targets[name] in filled for name in group.converted.values())

    def _filled(self, layer: int | None) -> dict[str, Filled]:
        """The parameters of a group that are filled in place."""
        group = self._groups.get(layer, Group())
        return filled_parameters(self._skeleton, group, self._tensors, as_stored=self._experts)

    def close(self) -> None:
        """Ends the background thread, and the downloads that it may be waiting for."""
        self._reader.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Puts a tensor in the place of a parameter or buffer of any shape, dtype and device."""
    owner, _, attribute = name.rpartition(".")
    holder = module.get_submodule(owner)
    if attribute in holder._buffers:
        holder._buffers[attribute] = value
    else:
        holder._parameters[attribute] = nn.Parameter(value, requires_grad=False)


def free(module: nn.Module) -> None:
    """Takes the weights of a module away; buffers that are computed instead of stored stay."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for name, buffer in child._buffers.items():
            if buffer is not None and name not in child._non_persistent_buffers_set:
                child._buffers[name] = torch.empty_like(buffer, device="meta")


def move_computed_buffers(module: nn.Module, device: torch.device) -> None:
    """Moves the buffers that are computed instead of stored (rotary frequencies) to a device."""
    for child in module.modules():
        for name in child._non_persistent_buffers_set:
            if (buffer := child._buffers[name]) is not None:
                child._buffers[name] = buffer.to(device)
