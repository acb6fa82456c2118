"""Every published checkpoint that tests know."""

from collections.abc import Mapping

from published import (
    deepseek,
    deepseek_v4,
    encoder_decoder,
    ernie_minimax_vl,
    gemma,
    glm,
    glm_kimi_vl,
    gpt_oss,
    hybrids,
    kimi,
    llama,
    mistral_aria,
    mixtral,
    more_text,
    packed,
    qwen,
    qwen_omni,
    qwen_vl,
    refused,
)
from published.checkpoint import Checkpoint

_FAMILIES = (
    deepseek,
    deepseek_v4,
    encoder_decoder,
    ernie_minimax_vl,
    gemma,
    glm_kimi_vl,
    mistral_aria,
    glm,
    gpt_oss,
    hybrids,
    kimi,
    llama,
    mixtral,
    more_text,
    packed,
    qwen,
    qwen_omni,
    qwen_vl,
    refused,
)
CHECKPOINTS: Mapping[str, Checkpoint] = {
    checkpoint.name: checkpoint for family in _FAMILIES for checkpoint in family.CHECKPOINTS
}
