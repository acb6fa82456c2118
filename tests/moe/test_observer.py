"""The probe computes what transformers computes, and its statistics are those of every expert on every token.

E experts, T tokens, H hidden size, K experts per token.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
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

from hcsmoe_hub.calibration.statistics import ExpertStatistics
from hcsmoe_hub.moe.experts import (
    PROBE,
    Experts,
    experts_of,
    is_experts_module,
    observe,
    register_probe,
    stop_observing,
)
from hcsmoe_hub.moe.observer import ROW_MULTIPLE, CalibrationObserver, RoutedObserver, mean_outputs

E, H, K = 6, 32, 2
# Sequences and lengths of three micro-batches; no number of tokens suits a row count that matrix products like.
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
    """No gate; the experts live in a smaller space than the block, beside a shared expert."""
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
    """The router may choose a class that is no expert."""
    config = ZayaConfig(**SMALL, num_experts=E, num_experts_per_tok=1, moe_intermediate_size=24, router_hidden_size=16)
    return AutoModelForCausalLM.from_config(config)


def muse_spark() -> PreTrainedModel:
    """A norm after every expert: the output is no affine function of the hidden activation."""
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


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=ARCHITECTURES)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    with torch.no_grad():
        model = ARCHITECTURES[request.param]().float().eval()
        randomise(model)
        path = next(name for name, module in model.named_modules() if is_experts_module(module))
        block = model.get_submodule(path.rpartition(".")[0])
        numbers = torch.Generator().manual_seed(1)
        batches = [torch.randn(*shape, H, generator=numbers) for shape in BATCHES]
        register_probe()
        yield Case(model, block, model.get_submodule(path), batches)


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


def probe(case: Case) -> tuple[CalibrationObserver, list[Tensor]]:
    """Runs the block under observation; returns the observer and the block's outputs."""
    case.use(PROBE)
    observer = CalibrationObserver(ExpertStatistics.empty(E))
    observe(case.block, case.experts, observer)
    outputs = case.run()
    stop_observing(case.block, case.experts)
    return observer, outputs


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# The probe against transformers


def test_the_block_computes_under_observation_what_transformers_computes(case: Case) -> None:
    expected = eager(case).block_TH
    observer, outputs = probe(case)
    assert [len(output) for output in outputs] == [7, 99, 130]
    assert relative(torch.cat(outputs), expected) < 1e-5
    assert len(observer.outputs) == len(observer.top_k) == len(BATCHES)


def test_the_remembered_outputs_are_the_weighted_sums_of_the_chosen_experts(case: Case) -> None:
    seen = eager(case)
    observer, _ = probe(case)
    outputs = seen.outputs_ETH
    if is_llama4(case):
        # Its router scales what goes into an expert, not what comes out.
        scaled = torch.stack([seen.tokens_TH * weight_T[:, None] for weight_T in seen.weight_TK.T])
        chosen = [case.experts(tokens_TH.repeat(E, 1)).view(E, *tokens_TH.shape) for tokens_TH in scaled]
        expected = sum(
            output_ETH[index_T, torch.arange(len(index_T))]
            for output_ETH, index_T in zip(chosen, seen.index_TK.T, strict=True)
        )
    else:
        picked_TKH = outputs[seen.index_TK, torch.arange(len(seen.index_TK))[:, None]]
        expected = (picked_TKH * seen.weight_TK[..., None]).sum(1)
    assert relative(torch.cat(observer.outputs), expected) < 1e-5


def test_mean_outputs_are_the_means_of_every_expert_over_all_tokens(case: Case) -> None:
    seen = eager(case)
    observer, _ = probe(case)
    means = mean_outputs(experts_of(case.experts), observer.statistics)
    assert means.dtype == torch.float32
    assert means.shape == (E, seen.tokens_TH.shape[1])
    expected = seen.outputs_ETH.double().mean(1)
    for mean, exact in zip(means, expected, strict=True):
        assert relative(mean, exact) < 1e-5


def test_usage_is_how_often_the_router_chose_an_expert(case: Case) -> None:
    seen = eager(case)
    observer, _ = probe(case)
    chosen = seen.index_TK[seen.weight_TK != 0]
    assert torch.equal(observer.statistics.usage_E, torch.bincount(chosen, minlength=E))
    assert observer.statistics.tokens == len(seen.tokens_TH)
    assert len(set(observer.statistics.usage_E.tolist())) > 1


def test_the_remembered_choice_is_the_choice_of_the_router(case: Case) -> None:
    seen = eager(case)
    observer, _ = probe(case)
    remembered = torch.cat(observer.top_k)
    assert remembered.dtype == torch.int16
    assert torch.equal(remembered.long(), torch.where(seen.weight_TK != 0, seen.index_TK, -1))


def test_saliency_is_the_mean_of_weight_times_norm_over_the_routed_tokens(case: Case) -> None:
    seen = eager(case)
    observer, _ = probe(case)
    for expert, saliency in enumerate(observer.statistics.saliency().tolist()):
        token, slot = torch.where((seen.index_TK == expert) & (seen.weight_TK != 0))
        weight_N1 = seen.weight_TK[token, slot, None]
        if is_llama4(case):
            states = torch.zeros(E, len(token), H)
            states[expert] = seen.tokens_TH[token] * weight_N1
            routed_NH = case.experts(states.flatten(0, 1)).view_as(states)[expert]
        else:
            routed_NH = seen.outputs_ETH[expert, token] * weight_N1
        assert saliency == pytest.approx(float(routed_NH.norm(dim=-1).mean()) if len(token) else 0, rel=1e-5)


def test_statistics_do_not_depend_on_the_micro_batches(case: Case) -> None:
    observer, _ = probe(case)
    case.batches = [torch.cat([states.flatten(0, -2) for states in case.batches])[None]]
    whole, _ = probe(case)
    assert torch.equal(whole.statistics.usage_E, observer.statistics.usage_E)
    assert relative(observer.statistics.mean_features(), whole.statistics.mean_features()) < 1e-6
    assert relative(observer.statistics.saliency(), whole.statistics.saliency()) < 1e-6


def test_half_precision_stays_close_to_transformers_in_half_precision(case: Case) -> None:
    case.model.bfloat16()
    case.batches = [states.bfloat16() for states in case.batches]
    seen = eager(case)
    observer, outputs = probe(case)
    assert outputs[0].dtype == torch.bfloat16
    assert relative(torch.cat(outputs), seen.block_TH) < 2e-2
    means = mean_outputs(experts_of(case.experts), observer.statistics)
    assert relative(means, seen.outputs_ETH.double().mean(1)) < 2e-2


def test_nothing_remains_when_the_observation_ends(case: Case) -> None:
    expected = eager(case).block_TH
    before = (set(vars(case.block)), set(vars(case.experts)))
    probe(case)
    assert (set(vars(case.block)), set(vars(case.experts))) == before
    case.use("eager")
    assert torch.equal(torch.cat(case.run()), expected)


def test_a_class_that_is_no_expert_is_routed_nowhere() -> None:
    with torch.no_grad():
        model = zaya().float().eval()
        randomise(model)
        path = next(name for name, module in model.named_modules() if is_experts_module(module))
        block, experts = model.get_submodule(path.rpartition(".")[0]), model.get_submodule(path)
        # As probable as the experts: some tokens choose it, some do not.
        block.gate.balancing_biases.zero_()
        register_probe()
        model.set_experts_implementation(PROBE)
        observer = CalibrationObserver(ExpertStatistics.empty(E))
        observe(block, experts, observer)
        states = torch.randn(1, 500, H, generator=torch.Generator().manual_seed(2))
        logits, _, _, _ = block.gate(states)
        chosen = logits.argmax(-1)
        block(states)
    skipped = int((chosen == E).sum())
    assert 0 < skipped < 500
    assert observer.statistics.usage_E.tolist() == torch.bincount(chosen.flatten(), minlength=E + 1)[:E].tolist()
    assert int((observer.top_k[0] == -1).sum()) == skipped


def test_only_modules_that_hold_routed_experts_can_be_observed(case: Case) -> None:
    found = [name for name, module in case.model.named_modules() if is_experts_module(module)]
    assert len(found) == 1
    assert experts_of(case.experts).num_experts == E


# The observer by hand


class Plain(Experts):
    """Expert e turns x into (e + 1) * x + 100 * e, in two steps."""

    num_experts = 3

    def __init__(self) -> None:
        self.rows: list[int] = []

    def hidden(self, expert: int, tokens_TH: Tensor) -> Tensor:
        self.rows.append(len(tokens_TH))
        return (expert + 1) * tokens_TH

    def project(self, expert: int, hidden_TI: Tensor) -> Tensor:
        return hidden_TI + 100 * expert


class Curved(Plain):
    """A square after the projection, which no mean may be moved across."""

    is_affine = False

    def project(self, expert: int, hidden_TI: Tensor) -> Tensor:
        return super().project(expert, hidden_TI).square()


class Scaled(Plain):
    """The router weight multiplies the input."""

    scales_input = True


TOKENS = torch.tensor([[1.0], [2.0], [3.0]])


def look(experts: Experts, index: list[list[int]], weight: list[list[float]]) -> tuple[Tensor, CalibrationObserver]:
    observer = CalibrationObserver(ExpertStatistics.empty(experts.num_experts))
    return observer(experts, TOKENS, torch.tensor(index), torch.tensor(weight)), observer


def test_outputs_are_weighted_and_summed_by_hand() -> None:
    output, observer = look(Plain(), [[0, 1], [2, 1], [0, 2]], [[0.5, 0.25], [1.0, 0.5], [2.0, 1.0]])
    expected = [[0.5 * 1 + 0.25 * 102], [206 + 0.5 * 104], [2 * 3 + 209]]
    assert output.tolist() == expected
    assert observer.outputs[0].tolist() == expected
    assert observer.statistics.saliency().tolist() == [(0.5 * 1 + 2 * 3) / 2, (25.5 + 52) / 2, (206 + 209) / 2]


def test_a_weight_of_zero_is_no_choice() -> None:
    output, observer = look(Plain(), [[0, 1], [0, 1], [0, 2]], [[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    assert output.tolist() == [[1], [2 + 104], [3]]
    assert observer.top_k[0].tolist() == [[0, -1], [0, 1], [0, -1]]
    assert observer.statistics.usage_E.tolist() == [3, 1, 0]


def test_an_index_beyond_the_experts_is_no_choice() -> None:
    output, observer = look(Plain(), [[0, 3], [3, 4], [7, 2]], [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    assert output.tolist() == [[1], [0], [209]]
    assert observer.top_k[0].tolist() == [[0, -1], [-1, -1], [-1, 2]]
    assert observer.statistics.usage_E.tolist() == [1, 0, 1]
    assert observer.statistics.saliency().tolist() == [1, 0, 209]


@pytest.mark.parametrize("kind", [Plain, Curved, Scaled])
def test_features_cover_all_tokens_wherever_they_were_routed(kind: type[Plain]) -> None:
    experts = kind()
    _, observer = look(experts, [[0], [0], [0]], [[0.1], [0.2], [0.3]])
    _, elsewhere = look(experts, [[1], [2], [5]], [[0.5], [0.0], [1.0]])
    means = mean_outputs(experts, observer.statistics)
    outputs = [experts.project(expert, experts.hidden(expert, TOKENS)) for expert in range(3)]
    assert means.flatten().tolist() == pytest.approx([float(output.mean()) for output in outputs])
    assert torch.equal(mean_outputs(experts, elsewhere.statistics), means)


def test_a_router_weight_that_scales_the_input_does_not_scale_the_output() -> None:
    output, _ = look(Scaled(), [[1], [1], [1]], [[0.5], [0.5], [0.5]])
    assert output.tolist() == [[100 + 1], [100 + 2], [100 + 3]]


def test_watching_the_routing_alone_runs_an_expert_on_its_own_tokens_only() -> None:
    experts = Plain()
    observer = RoutedObserver()
    output = observer(experts, TOKENS, torch.tensor([[0], [0], [2]]), torch.ones(3, 1))
    assert output.tolist() == [[1], [2], [209]]
    # Two of three experts have tokens; their rows are filled up to a multiple, which must not show in the output.
    assert experts.rows == [ROW_MULTIPLE, ROW_MULTIPLE]


def test_both_observers_compute_the_same() -> None:
    tokens = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    index = torch.randint(0, 4, (200, 2), generator=torch.Generator().manual_seed(1))
    weight = torch.rand(200, 2, generator=torch.Generator().manual_seed(2))
    routed, calibration = RoutedObserver(), CalibrationObserver(ExpertStatistics.empty(3))
    assert torch.equal(routed(Plain(), tokens, index, weight), calibration(Plain(), tokens, index, weight))
    assert torch.equal(routed.top_k[0], calibration.top_k[0])


def test_sums_of_half_precision_outputs_are_rounded_once() -> None:
    # 256 + 1 + 1 in bfloat16, one by one, would stay 256.
    class Constant(Plain):
        num_experts = 3

        def project(self, expert: int, hidden_TI: Tensor) -> Tensor:
            return torch.full_like(hidden_TI, (256, 1, 1)[expert])

    index, weight = torch.tensor([[0, 1, 2]]), torch.ones(1, 3, dtype=torch.bfloat16)
    output = RoutedObserver()(Constant(), torch.ones(1, 1, dtype=torch.bfloat16), index, weight)
    assert output.dtype == torch.bfloat16
    assert output.tolist() == [[258]]
