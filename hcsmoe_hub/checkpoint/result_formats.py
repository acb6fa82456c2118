"""Which formats and kernels the shape of a result fits.

K experts of W neurons, hidden size H. Rows of the gate and up projections have H weights, rows of the down projection
W: quantisers cut them into blocks, kernels into tiles. All widths here are numbers of neurons of one expert.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# What kernels and quantisers want widths to be multiples of, best first, and what small models are left with.
STEPS = (256, 128, 64, 32, 16, 8, 1)
# How far a share of the neurons is moved to such a multiple, as a share of all neurons.
ROUNDING = 1 / 16
# Names of the width of routed experts in configs; where there is the first, the second is that of dense layers.
_WIDTH_KEYS = ("moe_intermediate_size", "intermediate_size")
# vLLM, csrc/libtorch_stable/moe/topk_softplus_sqrt_kernels.cu: the counts with an instance (vllm-project/vllm#50982).
ROUTER_COUNTS: Mapping[str, tuple[int, ...]] = {
    "deepseek_v4": (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 576),
}
# FlashInfer's TRT-LLM kernels for bfloat16 experts, vLLM's choice on Blackwell: neurons per part (EuroEval#2079).
TILE = 128
# What tensor parallelism cuts into equal parts, besides attention heads.
SPLIT_KEYS: Mapping[str, tuple[str, ...]] = {
    "mixtral": ("intermediate_size",),
    "qwen2_moe": ("moe_intermediate_size", "shared_expert_intermediate_size"),
    "qwen3_moe": ("moe_intermediate_size",),
    "olmoe": ("intermediate_size",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What decides which formats a result fits.

    Attributes:
        width: W.
        hidden_size: H.
    """

    width: int
    hidden_size: int


@dataclass(frozen=True, slots=True)
class Format:
    """A format that weights can be quantised to, and the shape that it wants.

    Attributes:
        name: Its name.
        step: What W and H must be multiples of.
        otherwise: What becomes of experts that do not fit.
    """

    name: str
    step: int
    otherwise: str

    def fits(self, shape: Shape) -> bool:
        """Whether all matrices of the experts fit."""
        return shape.width % self.step == 0 and shape.hidden_size % self.step == 0

    def problem(self, shape: Shape) -> str:
        """Why some do not."""
        parts = [
            f"{what} {number} is not a multiple of {self.step}"
            for what, number in (("expert width", shape.width), ("hidden size", shape.hidden_size))
            if number % self.step
        ]
        return " and ".join(parts)


FORMATS = (
    # ggml: a block of Q8_0 or Q4_0 is 32 weights of a row; llama.cpp b11434, src/llama-quant.cpp, tensor_type_fallback.
    Format("GGUF Q8_0 and Q4_0", 32, "llama.cpp stores those matrices as F16"),
    # The same function: types whose blocks are 256 weights of a row, and what it takes instead.
    Format("GGUF K-quants", 256, "llama.cpp takes Q4_0 for Q2_K and Q3_K, Q5_0 for Q4_K, Q5_1 for Q5_K, Q8_0 for Q6_K"),
    # vLLM, quantization/utils/fp8_utils.py, validate_fp8_block_shape; SGLang refuses alike.
    Format("FP8 in blocks of 128", 128, "vLLM and SGLang refuse such blocks; use one scale per channel"),
    # torch._scaled_mm and CUTLASS: both dimensions of the weight.
    Format("FP8 per channel", 16, "FP8 matrix products need multiples of 16"),
    # OCP microscaling: 32 weights share a scale.
    Format("MXFP4", 32, "a block would end within the next row"),
    # NVFP4: 16 weights share a scale.
    Format("NVFP4", 16, "a block would end within the next row"),
    # vLLM, quantization/utils/marlin_utils.py, check_moe_marlin_supports_layer, with groups of 128.
    Format("AWQ and GPTQ in groups of 128", 128, "vLLM's Marlin kernels do not take them"),
    # mlx-lm, utils.py, quantize_model: rows are cut into groups of 64 by default.
    Format("MLX in groups of 64", 64, "mlx-lm leaves those matrices as they are"),
)


def read_shape(config: Mapping[str, Any], width: int | None = None) -> Shape | None:
    """Shape of the routed experts of a result, as far as its config says.

    Args:
        config: ``config.json``.
        width: W where it is known.

    Returns:
        ``None`` if the config has no common name for one of the sizes.
    """
    for section in (config, config.get("text_config") or {}):
        hidden = section.get("hidden_size")
        found = width or next((section[key] for key in _WIDTH_KEYS if isinstance(section.get(key), int)), None)
        if isinstance(hidden, int) and found is not None:
            return Shape(width=found, hidden_size=hidden)
    return None


def formats_that_fit(shape: Shape) -> list[Format]:
    """The formats that a result can be quantised to as it is."""
    return [known for known in FORMATS if known.fits(shape)]


def formats_that_do_not(shape: Shape) -> list[Format]:
    """The formats that some matrices of a result do not fit."""
    return [known for known in FORMATS if not known.fits(shape)]


def format_facts(shape: Shape) -> dict[str, Any]:
    """The same as JSON: sizes, names of the formats that fit, and reasons by the names of those that do not."""
    return {
        "expert_width": shape.width,
        "hidden_size": shape.hidden_size,
        "to": [known.name for known in formats_that_fit(shape)],
        "not_to": {known.name: f"{known.problem(shape)}; {known.otherwise}" for known in formats_that_do_not(shape)},
    }


def nearest_experts(model_type: str, experts: int, limit: int) -> int:
    """The number of experts nearest to a wanted one that the servers of an architecture run.

    Args:
        model_type: As in the config.
        experts: K as it was asked for.
        limit: N, the experts of the source.

    Returns:
        K itself where any number runs, or where it is N; of two that are equally near, the larger. Less than N if K is.
    """
    counts = [count for count in ROUTER_COUNTS.get(model_type, ()) if count < limit]
    if experts >= limit or not counts:
        return experts
    return min(counts, key=lambda count: (abs(count - experts), -count))


def router_warnings(model_type: str, experts: int, limit: int) -> list[str]:
    """That a server does not run a result with so many experts; empty if none is known not to.

    Args:
        model_type: As in the config.
        experts: K.
        limit: N, the experts of the source.
    """
    nearest = nearest_experts(model_type, experts, limit)
    if experts == nearest:
        return []
    return [
        f"vLLM does not start a {model_type} model of {experts} experts on CUDA: its router kernel is built for "
        f"certain numbers only. The nearest that runs is {nearest}."
    ]


def round_width(width: int, neurons: int) -> int:
    """The multiple of 256, or else 128, 64 and less, that is near a width; at most that of the source.

    Args:
        width: W as it was asked for, in neurons.
        neurons: I, the neurons of one expert of the source.
    """
    for step in STEPS:
        near = min(neurons, max(step, round(width / step) * step))
        if abs(near - width) <= ROUNDING * neurons:
            return near
    return width


def tensor_parallel_sizes(config: Mapping[str, Any], model_type: str, experts: int) -> list[int]:
    """Sizes that divide heads and widths and do not exceed the experts; empty if the config leaves that open.

    vLLM and SGLang refuse more parts than there are experts in most of their models.

    Args:
        config: ``config.json`` of the result.
        model_type: As in the config.
        experts: Experts per layer in it.
    """
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    keys = SPLIT_KEYS.get(model_type, ())
    widths = [width for key in keys if isinstance(width := config.get(key), int)]
    if not isinstance(heads, int) or not isinstance(groups, int) or not keys or len(widths) < len(keys):
        return []
    return [
        size
        for size in range(1, min(experts, heads) + 1)
        # Key and value heads are either split or replicated.
        if all(number % size == 0 for number in (heads, *widths)) and max(groups, size) % min(groups, size) == 0
    ]


def expert_parallel_sizes(experts: int) -> list[int]:
    """Sizes of expert parallelism that SGLang accepts: those that divide the number of experts."""
    return [size for size in range(1, experts + 1) if experts % size == 0]


def whole_tiles(sizes: list[int], width: int) -> list[int]:
    """Sizes of tensor parallelism that leave every part a whole number of tiles of neurons.

    Args:
        sizes: Those that divide everything they must.
        width: W.
    """
    return [size for size in sizes if width % (size * TILE) == 0]
