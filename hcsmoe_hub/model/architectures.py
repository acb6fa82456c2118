"""The architectures that the conformance suite proves, and how each one's router chooses.

Nothing here steers the conversion, which is generic; the table says what was tested, and why the rest is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass

# For what the table does not foresee.
REPORT_HINT = "report this checkpoint; it needs support of its own"

SOFTMAX_TOP_K = "softmax over all experts, then top-k"
SOFTMAX_TOP_K_RENORMALISED = "softmax over all experts, then top-k, renormalised"
TOP_K_SOFTMAX = "top-k of the logits, then softmax"
SIGMOID_GROUPS = "sigmoid; top-k of score plus correction bias within the best groups"
SIGMOID_BIAS = "sigmoid; top-k of score plus correction bias"

# Which widths `expert_width` takes: any, or those that divide the width of all shared experts, whose number follows.
ANY_WIDTH = "any"
WIDTH_DIVISORS = "divisors"


@dataclass(frozen=True, slots=True)
class Architecture:
    """One ``model_type`` that published checkpoints have.

    Attributes:
        model_type: As in ``config.json``.
        example: A repository with such a checkpoint.
        router: How its router turns scores into a choice.
        text_type: ``model_type`` of the language model within, where that is another one.
        note: What else follows the experts, or differs from the common case.
        refusal: Why it is not converted; empty if it is.
        width: Which widths its experts can have in a result: ``any``, ``divisors`` of the width of its shared experts,
            or empty where the source's is the only one.
    """

    model_type: str
    example: str
    router: str
    text_type: str = ""
    note: str = ""
    refusal: str = ""
    width: str = ANY_WIDTH

    @property
    def language_model(self) -> str:
        """``model_type`` of the language model, whether it stands alone or not."""
        return self.text_type or self.model_type


_BIAS = "correction bias reduced with the rows"

FAMILIES = (
    Architecture("afmoe", "arcee-ai/Trinity-Mini", SIGMOID_BIAS, note=_BIAS, width=WIDTH_DIVISORS),
    Architecture("aria", "rhymes-ai/Aria", TOP_K_SOFTMAX, text_type="aria_text", width=WIDTH_DIVISORS),
    Architecture("axk1", "skt/A.X-K1", SIGMOID_GROUPS, note=_BIAS, width=WIDTH_DIVISORS),
    Architecture("axk2", "skt/A.X-K2", SIGMOID_GROUPS, note=_BIAS, width=WIDTH_DIVISORS),
    Architecture("bailing_hybrid", "inclusionAI/Ling-3.0-Flash", SIGMOID_GROUPS, note=_BIAS, width=WIDTH_DIVISORS),
    Architecture("beam", "reflection/Beam-1.0-501B-A23B", SIGMOID_GROUPS, note=_BIAS),
    Architecture(
        "cohere2_moe",
        "CohereLabs/command-a-plus-05-2026",
        "top-k of the logits, then softmax or sigmoid",
        width=WIDTH_DIVISORS,
    ),
    Architecture(
        "dbrx",
        "databricks/dbrx-base",
        SOFTMAX_TOP_K_RENORMALISED,
        note="experts stored below each other in three matrices",
    ),
    Architecture(
        "deepseek_v2",
        "deepseek-ai/DeepSeek-V2-Lite",
        "softmax over all experts, then top-k, optionally within the best groups",
        width=WIDTH_DIVISORS,
    ),
    Architecture("deepseek_v3", "deepseek-ai/DeepSeek-V3", SIGMOID_GROUPS, note=_BIAS, width=WIDTH_DIVISORS),
    Architecture("deepseek_v32", "deepseek-ai/DeepSeek-V3.2-Exp", SIGMOID_GROUPS, note=_BIAS, width=WIDTH_DIVISORS),
    Architecture(
        "deepseek_v4",
        "deepseek-ai/DeepSeek-V4-Flash",
        "square root of softplus; top-k of score plus correction bias, or a table from token to experts",
        note="the token table of hash layers is renumbered",
        width="",
    ),
    Architecture(
        "doge",
        "SmallDoge/Doge-320M",
        "product-key retrieval",
        refusal="its experts are single rows, retrieved by product keys; there are no expert outputs to cluster",
        width="",
    ),
    Architecture("dots1", "rednote-hilab/dots.llm1.inst", SIGMOID_GROUPS, note=_BIAS, width=WIDTH_DIVISORS),
    Architecture("dots3_note", "dots-studio/dots3-note-prev", SIGMOID_GROUPS, text_type="dots3_note_text", note=_BIAS),
    Architecture(
        "ernie4_5_moe",
        "baidu/ERNIE-4.5-21B-A3B-PT",
        "softmax; top-k of probability plus correction bias, renormalised",
        note=_BIAS,
        width=WIDTH_DIVISORS,
    ),
    Architecture(
        "ernie4_5_vl_moe",
        "baidu/ERNIE-4.5-VL-28B-A3B-PT",
        "softmax; top-k of probability plus correction bias, renormalised",
        text_type="ernie4_5_vl_moe_text",
        refusal=(
            "one expert count sizes both its experts for text and its experts for images, and text alone does not "
            "reach the latter"
        ),
        width="",
    ),
    Architecture("exaone_moe", "LGAI-EXAONE/K-EXAONE-236B-A23B", SIGMOID_GROUPS, note=_BIAS, width=WIDTH_DIVISORS),
    Architecture("flex_olmo", "allenai/FlexOlmo-7x7B-1T", SOFTMAX_TOP_K),
    Architecture("flint", "RecursiveSI/flint", "sigmoid, then top-k"),
    Architecture(
        "gemma4",
        "google/gemma-4-26B-A4B-it",
        SOFTMAX_TOP_K_RENORMALISED,
        text_type="gemma4_text",
        note="per-expert scale reduced with the rows",
    ),
    Architecture("glm4_moe", "zai-org/GLM-4.5-Air", SIGMOID_GROUPS, note=_BIAS, width=WIDTH_DIVISORS),
    Architecture("glm4_moe_lite", "zai-org/GLM-4.7-Flash", SIGMOID_GROUPS, note=_BIAS, width=WIDTH_DIVISORS),
    Architecture(
        "glm4v_moe", "zai-org/GLM-4.5V", SIGMOID_GROUPS, text_type="glm4v_moe_text", note=_BIAS, width=WIDTH_DIVISORS
    ),
    Architecture("glm_moe_dsa", "zai-org/GLM-5", SIGMOID_GROUPS, note=_BIAS, width=WIDTH_DIVISORS),
    Architecture("gpt_oss", "openai/gpt-oss-20b", TOP_K_SOFTMAX, note="router bias reduced with the rows"),
    Architecture("granitemoe", "ibm-granite/granite-3.1-3b-a800m-instruct", TOP_K_SOFTMAX),
    Architecture("granitemoe_swa", "ibm-granite/granite-swash-3b-a600m", TOP_K_SOFTMAX),
    Architecture("granitemoehybrid", "ibm-granite/granite-4.0-h-tiny", TOP_K_SOFTMAX),
    Architecture("granitemoeshared", "ibm-research/moe-7b-1b-active-shared-experts", TOP_K_SOFTMAX),
    Architecture("hunyuan_v1_moe", "tencent/Hunyuan-A13B-Instruct", SOFTMAX_TOP_K_RENORMALISED, width=""),
    Architecture("hy_v3", "tencent/Hy3-preview", SIGMOID_BIAS, note=_BIAS, width=WIDTH_DIVISORS),
    Architecture("hy_v4", "tencent/Hy4-preview", SIGMOID_GROUPS, note=_BIAS, width=WIDTH_DIVISORS),
    Architecture(
        "inkling2", "thinkingmachines/Inkling-2-Small-MXFP8", SIGMOID_BIAS, text_type="inkling2_text", note=_BIAS
    ),
    Architecture(
        "inkling_mm_model",
        "thinkingmachines/Inkling",
        SIGMOID_BIAS,
        text_type="inkling_text",
        note="router rows of the shared experts stay",
        width="",
    ),
    Architecture("jamba", "ai21labs/Jamba-v0.1", SOFTMAX_TOP_K, width=""),
    Architecture(
        "jetmoe",
        "jetmoe/jetmoe-8b",
        TOP_K_SOFTMAX,
        refusal="one expert count sizes both its feed-forward and its attention experts, and attention experts cannot "
        "be merged by their outputs",
        width="",
    ),
    Architecture(
        "kimi_k2",
        "moonshotai/Kimi-K2-Instruct",
        SIGMOID_GROUPS,
        text_type="deepseek_v3",
        note=_BIAS,
        width=WIDTH_DIVISORS,
    ),
    Architecture(
        "kimi_k25", "moonshotai/Kimi-K2.5", SIGMOID_GROUPS, text_type="deepseek_v3", note=_BIAS, width=WIDTH_DIVISORS
    ),
    Architecture(
        "kimi_linear", "moonshotai/Kimi-Linear-48B-A3B-Instruct", SIGMOID_GROUPS, note=_BIAS, width=WIDTH_DIVISORS
    ),
    Architecture("kolibri1", "Aleph-Alpha/Kolibri-1", "top-k of logit plus correction bias, then sigmoid", note=_BIAS),
    Architecture("laguna", "poolside/laguna-XS.2", SIGMOID_BIAS, note=_BIAS),
    Architecture("lfm2_moe", "LiquidAI/LFM2-8B-A1B", SIGMOID_BIAS, note=_BIAS),
    Architecture(
        "llama4",
        "meta-llama/Llama-4-Scout-17B-16E-Instruct",
        "top-k of the logits, then sigmoid",
        text_type="llama4_text",
        note="the router weight multiplies the expert's input",
        width="",
    ),
    Architecture(
        "longcat_flash",
        "meituan-longcat/LongCat-Flash-Chat",
        "softmax over experts and zero-computation experts, top-k of probability plus bias",
        refusal="transformers 5.23 gives its zero-computation experts weights that no published checkpoint has, so "
        "neither the source nor a result would load",
        width="",
    ),
    Architecture("mellum", "JetBrains/Mellum2-12B-A2.5B-Base", SOFTMAX_TOP_K),
    Architecture("mimo_v2_flash", "XiaomiMiMo/MiMo-V2-Flash", SIGMOID_GROUPS, note=_BIAS),
    Architecture("minimax", "MiniMaxAI/MiniMax-Text-01-hf", SOFTMAX_TOP_K_RENORMALISED),
    Architecture("minimax_m2", "MiniMaxAI/MiniMax-M2", SIGMOID_BIAS, note=_BIAS),
    Architecture("minimax_m3_vl", "MiniMaxAI/MiniMax-M3", SIGMOID_BIAS, text_type="minimax_m3_vl_text", note=_BIAS),
    Architecture(
        "mistral3",
        "mistralai/Mistral-Small-4-119B-2603",
        "softmax, then top-k within the best groups",
        text_type="mistral4",
        width=WIDTH_DIVISORS,
    ),
    Architecture("mixtral", "mistralai/Mixtral-8x7B-v0.1", SOFTMAX_TOP_K_RENORMALISED),
    Architecture(
        "nemotron_h",
        "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        SIGMOID_GROUPS,
        note=_BIAS + "; experts without a gate projection",
    ),
    Architecture(
        "nllb-moe",
        "facebook/nllb-moe-54b",
        "softmax over all experts, then top-2, renormalised",
        note="encoder and decoder; experts without a gate projection",
        width="",
    ),
    Architecture("olmoe", "allenai/OLMoE-1B-7B-0924", SOFTMAX_TOP_K),
    Architecture(
        "phimoe", "microsoft/Phi-3.5-MoE-instruct", "sparsemixer: two experts, one masked softmax after the other"
    ),
    Architecture("qwen2_moe", "Qwen/Qwen1.5-MoE-A2.7B", SOFTMAX_TOP_K),
    Architecture("qwen3_5_moe", "Qwen/Qwen3.5-35B-A3B", SOFTMAX_TOP_K_RENORMALISED, text_type="qwen3_5_moe_text"),
    Architecture("qwen3_moe", "Qwen/Qwen3-30B-A3B", SOFTMAX_TOP_K),
    Architecture("qwen3_next", "Qwen/Qwen3-Next-80B-A3B-Instruct", SOFTMAX_TOP_K),
    Architecture("qwen3_omni_moe", "Qwen/Qwen3-Omni-30B-A3B-Instruct", SOFTMAX_TOP_K, text_type="qwen3_omni_moe_text"),
    Architecture("qwen3_vl_moe", "Qwen/Qwen3-VL-30B-A3B-Instruct", SOFTMAX_TOP_K, text_type="qwen3_vl_moe_text"),
    Architecture("qwen4_exp", "Qwen/Qwen4-Exp", SOFTMAX_TOP_K, text_type="qwen4_exp_text"),
    Architecture("solar_open", "upstage/Solar-Open-100B", SIGMOID_GROUPS, note=_BIAS, width=WIDTH_DIVISORS),
    Architecture(
        "switch_transformers",
        "google/switch-base-8",
        "softmax over all experts, then top-1; tokens beyond an expert's capacity visit none",
        note="encoder and decoder; experts without a gate projection; capacity grows as experts become fewer",
        width="",
    ),
    Architecture(
        "zaya",
        "Zyphra/ZAYA1-8B",
        "softmax over experts and a skip class; top-k of probability plus bias",
        note="skip class stays",
    ),
)

# By the model type that is published, or else by that of a language model saved without the model around it.
ARCHITECTURES: Mapping[str, Architecture] = {
    **{family.language_model: family for family in FAMILIES},
    **{family.model_type: family for family in FAMILIES},
}
