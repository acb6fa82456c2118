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


@dataclass(frozen=True, slots=True)
class Architecture:
    """One ``model_type``.

    Attributes:
        model_type: As in ``config.json`` (of the text model, for composites).
        router: How its router turns scores into a choice.
        note: What else follows the experts, or differs from the common case.
        refusal: Why it is not converted; empty if it is.
    """

    model_type: str
    router: str
    note: str = ""
    refusal: str = ""


_BIAS = "correction bias reduced with the rows"

_ALL = (
    Architecture("afmoe", SIGMOID_BIAS, _BIAS),
    Architecture("aria_text", TOP_K_SOFTMAX),
    Architecture("axk1", SIGMOID_GROUPS, _BIAS),
    Architecture("axk2", SIGMOID_GROUPS, _BIAS),
    Architecture("bailing_hybrid", SIGMOID_GROUPS, _BIAS),
    Architecture("beam", SIGMOID_GROUPS, _BIAS),
    Architecture("cohere2_moe", "top-k of the logits, then softmax or sigmoid"),
    Architecture("dbrx", SOFTMAX_TOP_K_RENORMALISED, "experts stored below each other in three matrices"),
    Architecture("deepseek_v2", "softmax over all experts, then top-k, optionally within the best groups"),
    Architecture("deepseek_v3", SIGMOID_GROUPS, _BIAS),
    Architecture("deepseek_v32", SIGMOID_GROUPS, _BIAS),
    Architecture(
        "deepseek_v4",
        "square root of softplus; top-k of score plus correction bias, or a table from token to experts",
        "the token table of hash layers is renumbered",
    ),
    Architecture(
        "doge",
        "product-key retrieval",
        refusal="its experts are single rows, retrieved by product keys; there are no expert outputs to cluster",
    ),
    Architecture("dots1", SIGMOID_GROUPS, _BIAS),
    Architecture("dots3_note_text", SIGMOID_GROUPS, _BIAS),
    Architecture("ernie4_5_moe", "softmax; top-k of probability plus correction bias, renormalised", _BIAS),
    Architecture("exaone_moe", SIGMOID_GROUPS, _BIAS),
    Architecture("flex_olmo", SOFTMAX_TOP_K),
    Architecture("flint", "sigmoid, then top-k"),
    Architecture("gemma4_text", SOFTMAX_TOP_K_RENORMALISED, "per-expert scale reduced with the rows"),
    Architecture("glm4_moe", SIGMOID_GROUPS, _BIAS),
    Architecture("glm4_moe_lite", SIGMOID_GROUPS, _BIAS),
    Architecture("glm_moe_dsa", SIGMOID_GROUPS, _BIAS),
    Architecture("gpt_oss", TOP_K_SOFTMAX, "router bias reduced with the rows; MXFP4 is written back as bf16"),
    Architecture("granitemoe", TOP_K_SOFTMAX),
    Architecture("granitemoe_swa", TOP_K_SOFTMAX),
    Architecture("granitemoehybrid", TOP_K_SOFTMAX),
    Architecture("granitemoeshared", TOP_K_SOFTMAX),
    Architecture("hunyuan_v1_moe", SOFTMAX_TOP_K_RENORMALISED),
    Architecture("hy_v3", SIGMOID_BIAS, _BIAS),
    Architecture("hy_v4", SIGMOID_GROUPS, _BIAS),
    Architecture("inkling2_text", SIGMOID_BIAS, _BIAS),
    Architecture("inkling_text", SIGMOID_BIAS, "router rows of the shared experts stay"),
    Architecture("jamba", SOFTMAX_TOP_K),
    Architecture(
        "jetmoe",
        TOP_K_SOFTMAX,
        refusal="one expert count sizes both its feed-forward and its attention experts, and attention experts cannot "
        "be merged by their outputs",
    ),
    Architecture("kimi_linear", SIGMOID_GROUPS, _BIAS),
    Architecture("kolibri1", "top-k of logit plus correction bias, then sigmoid", _BIAS),
    Architecture("laguna", SIGMOID_BIAS, _BIAS),
    Architecture("lfm2_moe", SIGMOID_BIAS, _BIAS),
    Architecture("llama4_text", "top-k of the logits, then sigmoid", "the router weight multiplies the expert's input"),
    Architecture(
        "longcat_flash",
        "softmax over experts and zero-computation experts, top-k of probability plus bias",
        refusal="transformers 5.23 gives its zero-computation experts weights that no published checkpoint has, so "
        "neither the source nor a result would load",
    ),
    Architecture("mellum", SOFTMAX_TOP_K),
    Architecture("mimo_v2_flash", SIGMOID_GROUPS, _BIAS),
    Architecture("minimax", SOFTMAX_TOP_K_RENORMALISED),
    Architecture("minimax_m2", SIGMOID_BIAS, _BIAS),
    Architecture("minimax_m3_vl_text", SIGMOID_BIAS, _BIAS),
    Architecture("mistral4", "softmax, then top-k within the best groups"),
    Architecture("mixtral", SOFTMAX_TOP_K_RENORMALISED),
    Architecture("nemotron_h", SIGMOID_GROUPS, _BIAS + "; experts without a gate projection"),
    Architecture("olmoe", SOFTMAX_TOP_K),
    Architecture("phimoe", "sparsemixer: two experts, one masked softmax after the other"),
    Architecture("qwen2_moe", SOFTMAX_TOP_K),
    Architecture("qwen3_5_moe_text", SOFTMAX_TOP_K_RENORMALISED),
    Architecture("qwen3_moe", SOFTMAX_TOP_K),
    Architecture("qwen3_next", SOFTMAX_TOP_K),
    Architecture("qwen4_exp_text", SOFTMAX_TOP_K),
    Architecture("solar_open", SIGMOID_GROUPS, _BIAS),
    Architecture("zaya", "softmax over experts and a skip class; top-k of probability plus bias", "skip class stays"),
)

ARCHITECTURES: Mapping[str, Architecture] = {architecture.model_type: architecture for architecture in _ALL}
