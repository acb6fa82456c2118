"""MoE blocks of tiny models of several architectures, and what transformers and the probe compute in them.

E experts, T tokens, H hidden size, K experts per token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DbrxConfig,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    NemotronHConfig,
    PreTrainedModel,
    ZayaConfig,
)
from transformers.models.muse_spark.configuration_muse_spark import MuseSparkTextConfig
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkTextModel

from hcsmoe_hub.model.expert_kinds import experts_of, is_experts_module, use_probe
from hcsmoe_hub.observation.calibration_observer import CalibrationObserver
from hcsmoe_hub.observation.statistics import ExpertStatistics
from hcsmoe_hub.observation.wanted import Wanted

E, H, K = 6, 32, 2
# Sequences and lengths of three micro-batches; the token counts are not multiples of common block sizes.
BATCHES = ((1, 7), (3, 33), (2, 65))
SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": H,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def mixtral() -> PreTrainedModel:
    """The common case: gate and up in one matrix, one below the other."""
    config = MixtralConfig(**SMALL, num_local_experts=E, num_experts_per_tok=K)
    return AutoModelForCausalLM.from_config(config)


def gpt_oss() -> PreTrainedModel:
    """Biases, transposed matrices, gate and up in alternating columns."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = GptOssConfig(**SMALL, num_local_experts=E, num_experts_per_tok=K, sliding_window=8, rope_parameters=rope)
    return AutoModelForCausalLM.from_config(config)


def nemotron_h() -> PreTrainedModel:
    """No gate; the experts live in a smaller space than the block, next to a shared expert."""
    config = NemotronHConfig(
        **{name: value for name, value in SMALL.items() if name != "num_hidden_layers"},
        layers_block_type=["moe"],
        n_routed_experts=E,
        num_experts_per_tok=K,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=16,
        moe_latent_size=20,
        n_group=1,
        topk_group=1,
        use_mamba_kernels=False,
    )
    return AutoModelForCausalLM.from_config(config)


def llama4() -> PreTrainedModel:
    """The router weight multiplies the input; every expert runs on every token in transformers as well."""
    config = Llama4TextConfig(
        **SMALL,
        intermediate_size_mlp=24,
        num_local_experts=E,
        num_experts_per_tok=K,
        interleave_moe_layer_step=1,
        attention_chunk_size=16,
    )
    return AutoModelForCausalLM.from_config(config)


def dbrx() -> PreTrainedModel:
    """All experts one below the other in three matrices."""
    config = DbrxConfig(
        d_model=H,
        n_heads=4,
        n_layers=1,
        max_seq_len=64,
        vocab_size=32,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": E, "moe_top_k": K, "hidden_size": H},
    )
    return AutoModelForCausalLM.from_config(config)


def zaya() -> PreTrainedModel:
    """The router may choose a class that is not an expert."""
    config = ZayaConfig(**SMALL, num_experts=E, num_experts_per_tok=1, moe_intermediate_size=24, router_hidden_size=16)
    return AutoModelForCausalLM.from_config(config)


def muse_spark() -> PreTrainedModel:
    """A norm after every expert: the output is not an affine function of the hidden activation."""
    config = MuseSparkTextConfig(
        **SMALL, num_local_experts=E, num_experts_per_tok=K, moe_intermediate_size=24, moe_hidden_size=20
    )
    return MuseSparkTextModel(config)


ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    build.__name__: build for build in (mixtral, gpt_oss, nemotron_h, llama4, dbrx, zaya, muse_spark)
}


@dataclass
class Case:
    """The MoE block of a tiny model.

    Attributes:
        model: The whole model, with random weights.
        block: Router and experts.
        experts: The module that holds the experts' weights.
        batches: Inputs of the block, one entry per micro-batch.
    """

    model: PreTrainedModel
    block: nn.Module
    experts: nn.Module
    batches: list[Tensor]

    def use(self, implementation: str) -> None:
        """Switches the experts implementation where the architecture has one to switch."""
        if self.model._can_set_experts_implementation():
            self.model.set_experts_implementation(implementation)

    def run(self) -> list[Tensor]:
        """Outputs ``[T, H]`` of the block, per micro-batch."""
        outputs = [self.block(states) for states in self.batches]
        tensors = [output[0] if isinstance(output, tuple) else output for output in outputs]
        return [tensor.flatten(0, -2) for tensor in tensors]


@dataclass(frozen=True)
class Seen:
    """What transformers itself routed and computed: all micro-batches one after the other.

    Attributes:
        tokens_TH: Inputs of the experts.
        index_TK: The router's choice.
        weight_TK: The router's weights.
        block_TH: Outputs of the block.
        outputs_ETH: Every expert on every token.
    """

    tokens_TH: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    block_TH: Tensor
    outputs_ETH: Tensor


def randomise(model: nn.Module) -> None:
    """Weights large enough for a router that decides, biases that are not zero."""
    numbers = torch.Generator().manual_seed(0)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.dim() >= 2:
            tensor.copy_(torch.randn(tensor.shape, generator=numbers) * 0.3)
        elif "bias" in name:
            tensor.copy_(torch.randn(tensor.shape, generator=numbers) * 0.1)


def tiny_case(architecture: str) -> Case:
    """The block of one architecture, ready to be observed."""
    model = ARCHITECTURES[architecture]().float().eval()
    randomise(model)
    path = next(name for name, module in model.named_modules() if is_experts_module(module))
    block = model.get_submodule(path.rpartition(".")[0])
    numbers = torch.Generator().manual_seed(1)
    batches = [torch.randn(*shape, H, generator=numbers) for shape in BATCHES]
    return Case(model, block, model.get_submodule(path), batches)


def is_llama4(case: Case) -> bool:
    return type(case.experts).__name__ == "Llama4TextExperts"


def eager(case: Case) -> Seen:
    """Runs transformers' own implementation, and each expert alone through it."""
    case.use("eager")
    calls: list[tuple[Tensor, ...]] = []

    def remember(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        calls.append((*args, *kwargs.values()))

    hook = case.experts.register_forward_pre_hook(remember, with_kwargs=True)
    block_TH = torch.cat(case.run())
    hook.remove()
    if is_llama4(case):
        tokens_TH = torch.cat([states.flatten(0, -2) for states in case.batches])
        scores_TE, logits_TE = case.block.router(tokens_TH)
        index_TK = logits_TE.topk(K).indices
        # Eager runs E copies of the tokens through E experts.
        outputs_ETH = case.experts(tokens_TH.repeat(E, 1)).view(E, *tokens_TH.shape)
        return Seen(tokens_TH, index_TK, scores_TE.gather(1, index_TK), block_TH, outputs_ETH)
    tokens_TH = torch.cat([states.flatten(0, -2) for states, _, _ in calls])
    index_TK, weight_TK = (torch.cat([call[number] for call in calls]) for number in (1, 2))
    ones_T1 = torch.ones(len(tokens_TH), 1, dtype=tokens_TH.dtype)
    outputs = [case.experts(tokens_TH, torch.full((len(tokens_TH), 1), e), ones_T1) for e in range(E)]
    outputs_ETH = torch.stack([output.view_as(tokens_TH) for output in outputs])
    return Seen(tokens_TH, index_TK, weight_TK, block_TH, outputs_ETH)


def probe(case: Case, *, with_gram: bool = False) -> tuple[CalibrationObserver, list[Tensor]]:
    """Runs the block under observation; returns the observer and the block's outputs."""
    use_probe(case.model)
    observer = CalibrationObserver(ExpertStatistics.empty(E, wanted=Wanted(products=with_gram)))
    with experts_of(case.experts).observing(case.block, observer):
        outputs = case.run()
    return observer, outputs


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())
