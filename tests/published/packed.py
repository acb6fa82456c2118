"""Formats that no conversion reads: GPTQ and NVFP4."""

from published.checkpoint import Checkpoint
from published.collector import Config, Tensors
from published.mixtral import mixtral
from published.qwen import qwen3_moe

NVFP4_GROUP = 16


def _is_packed(name: str) -> bool:
    return name.endswith("proj.weight") or ".experts." in name


def gptq(t: Tensors, config: Config) -> None:
    """Mixtral as GPTQ: eight numbers of four bits in an integer, one scale per row."""
    plain = Tensors()
    mixtral(plain, config)
    for name, spec in plain.items.items():
        if not _is_packed(name):
            t.add(name, *spec.shape, dtype="F16")
            continue
        rows, columns = spec.shape
        prefix = name.removesuffix(".weight")
        t.add(f"{prefix}.qweight", columns // 8, rows, dtype="I32")
        t.add(f"{prefix}.qzeros", 1, rows // 8, dtype="I32")
        t.add(f"{prefix}.scales", 1, rows, dtype="F16")
        t.add(f"{prefix}.g_idx", columns, dtype="I32")


def nvfp4(t: Tensors, config: Config) -> None:
    """Qwen3 as NVFP4: two numbers in a byte, a scale for each 16 of them, and one for the matrix."""
    plain = Tensors()
    qwen3_moe(plain, config)
    for name, spec in plain.items.items():
        if not _is_packed(name):
            t.add(name, *spec.shape)
            continue
        rows, columns = spec.shape
        t.add(name, rows, columns // 2, dtype="U8")
        t.add(f"{name}_scale", rows, columns // NVFP4_GROUP, dtype="F8_E4M3")
        t.add(f"{name}_scale_2", dtype="F32")
        t.add(f"{name.removesuffix('weight')}input_scale", dtype="F32")


CHECKPOINTS = (
    Checkpoint(repo="TheBloke/Mixtral-8x7B-v0.1-GPTQ", tensors=gptq, billions=46.7),
    Checkpoint(repo="nvidia/Qwen3-30B-A3B-NVFP4", tensors=nvfp4, billions=30.5),
)
