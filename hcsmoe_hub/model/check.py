"""Checks that the stored tensors are those that the config describes."""

from collections.abc import Mapping

from hcsmoe_hub.checkpoint.tensors import StoredTensor
from hcsmoe_hub.errors import SourceError
from hcsmoe_hub.model.skeleton import Group, Skeleton


def check_against_config(
    skeleton: Skeleton, groups: Mapping[int | None, Group], stored: Mapping[str, StoredTensor]
) -> None:
    """Checks that the stored tensors are those that the config describes.

    Raises:
        SourceError: If a tensor is missing or has another shape than the config says.
    """
    hint = "config.json and the weights do not belong together, or the download is incomplete"
    for layer, group in groups.items():
        parameters = set(group.targets.values()) - group.dequantized
        state = {name: skeleton.state[name] for name in parameters}
        described = skeleton.to_stored(state, group.conversions)
        for name, tensor in described.items():
            found = stored.get(name)
            if found is None or found.shape != tuple(tensor.shape):
                where = "outside the layers" if layer is None else f"of layer {layer}"
                has = "is missing" if found is None else f"has the shape {list(found.shape)} in {found.shard}"
                raise SourceError(
                    f"tensor {name!r} {where} {has}; config.json describes {list(tensor.shape)}.", hint=hint
                )
        quantized = {key for key, target in group.targets.items() if target in group.dequantized}
        extra = group.targets.keys() - described.keys() - quantized
        if extra:
            raise SourceError(f"tensor {sorted(extra)[0]!r} is more than config.json describes.", hint=hint)
    loaded = {target for group in groups.values() for target in group.targets.values()}
    missing = skeleton.state.keys() - loaded - skeleton.module.all_tied_weights_keys.keys()
    if missing:
        raise SourceError(f"the checkpoint lacks the tensor for {sorted(missing)[0]!r}.", hint=hint)
