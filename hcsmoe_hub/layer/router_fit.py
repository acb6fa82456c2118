"""The fit of one layer's router, with a guard: it is kept only if it helps on text it was not fitted to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hcsmoe_hub.layer.context import LayerContext
from hcsmoe_hub.machine import ranks
from hcsmoe_hub.machine.smaller_pieces import and_host, first_that_fits
from hcsmoe_hub.methods.clustering import Clusters
from hcsmoe_hub.methods.refit.held_out import OwnTokens, split_tokens
from hcsmoe_hub.methods.routing import Scoring, find_rule, fit_rows, group_targets, mismatch, top_k_agreement
from hcsmoe_hub.model.blocks import ExpertTensor
from hcsmoe_hub.model.router import router_bias, router_weight, watch_router
from hcsmoe_hub.observation.observers import RouterObserver
from hcsmoe_hub.observation.runnable_block import RunnableBlock
from hcsmoe_hub.observation.statistics import Call, pick_tokens, spaced
from hcsmoe_hub.observation.watcher import Observation

# More tokens change the rows little; of more, as many are taken at even distances, and a quarter of them to judge.
ROUTER_TOKENS = 16384
JUDGED_TOKENS = ROUTER_TOKENS // 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterFit:
    """What a fit did.

    Attributes:
        is_kept: Whether it was no worse on held-out tokens; otherwise the rows stayed what they were.
        agreement_before: Top-k agreement of the rows before it, on all tokens.
    """

    is_kept: bool
    agreement_before: float


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """What a router did on the tokens of all ranks: T tokens, K choices, E rows of experts, X others, H inputs.

    On the CPU.
    """

    top_k_TK: Tensor
    weight_TK: Tensor
    inputs_TH: Tensor
    logits_TE: Tensor
    extra_TX: Tensor


class RouterFitter:
    """Fits the router of one block and compares what it did before and after.

    Args:
        layer: The layer; the router of its block has one matrix.
        clusters: Its groups of experts.
        seen: Inputs of the block in the source, on which the source's router is run.
        fitted: Inputs of the same tokens on which the reduced router is to follow it; often the same.
    """

    def __init__(self, layer: LayerContext, clusters: Clusters, *, seen: Observation, fitted: Observation) -> None:
        weight = router_weight(layer.block, layer.source.skeleton.state)
        assert weight is not None, "the plan refuses routers without a matrix"
        self._layer = layer
        self._weight = weight
        self._clusters = clusters
        self._seen = seen
        self._fitted_to = fitted
        self._own = OwnTokens.of(sum(map(len, seen.top_k)), layer.device)

    def fit(self, changed: dict[str, Tensor]) -> RouterFit:
        """Fits the rows among ``changed``, in place if that helps.

        Args:
            changed: Tensors of the block in the result, by parameter name.
        """
        chosen, split = self._choose()
        full, before = self._run(self._layer.source, self._seen.calls, chosen), self._run_reduced(changed, chosen)
        agreement_before = top_k_agreement(full.top_k_TK, before.top_k_TK, self._clusters)
        rule = find_rule(full.logits_TE, full.extra_TX, full.top_k_TK, full.weight_TK)
        target_TC, has_target_T = group_targets(full.logits_TE, full.extra_TX, full.top_k_TK, rule, self._clusters)
        taken, judged = (tokens[has_target_T[tokens]] for tokens in split)
        if not len(taken) or not len(judged):
            return RouterFit(is_kept=False, agreement_before=agreement_before)
        candidate = changed | self._fitted(changed, before, target_TC, taken, rule.scoring)
        after = self._run_reduced(candidate, chosen)

        def judge(run: _Run) -> tuple[float, ...]:
            """What must not grow: the loss on held-out tokens, and disagreement there and on all that were run."""
            extra_TX = run.extra_TX[judged].float()
            loss = mismatch(run.logits_TE[judged].float(), target_TC[judged], rule.scoring, extra_TX)
            parts = (judged, slice(None))
            return float(loss), *(
                -top_k_agreement(full.top_k_TK[part], run.top_k_TK[part], self._clusters) for part in parts
            )

        is_kept = all(new <= old for new, old in zip(judge(after), judge(before), strict=True))
        if is_kept:
            changed |= candidate
        return RouterFit(is_kept=is_kept, agreement_before=agreement_before)

    def _choose(self) -> tuple[Tensor | None, tuple[Tensor, Tensor]]:
        """The tokens that routers run on, ``None`` for all, and which of these are fitted and which judge."""
        split = split_tokens(self._own.total, self._seen.domains)
        fitted, judged = spaced(split.fitted, ROUTER_TOKENS), spaced(split.judged, JUDGED_TOKENS)
        if not self._layer.source.runs_on_tokens(self._seen.calls):
            return None, (fitted, judged)
        chosen = torch.cat([fitted, judged]).sort().values
        return chosen, (torch.searchsorted(chosen, fitted), torch.searchsorted(chosen, judged))

    def _fitted(
        self, changed: Mapping[str, Tensor], before: _Run, target_TC: Tensor, taken: Tensor, scoring: Scoring
    ) -> dict[str, Tensor]:
        """The fitted tensors, by parameter name: the matrix and its bias; others, such as correction biases, stay."""
        weight = self._weight
        bias = router_bias(self._layer.block, weight)

        def attempt(device: torch.device) -> tuple[Tensor, Tensor | None]:
            return fit_rows(
                before.inputs_TH[taken].to(device, torch.float32),
                target_TC[taken].to(device),
                weight.split(changed[weight.name])[0].to(device),
                None if bias is None else bias.split(changed[bias.name])[0].to(device),
                scoring=scoring,
                extra_TX=before.extra_TX[taken].to(device, torch.float32),
            )

        device = self._layer.device
        found = first_that_fits(attempt, and_host(device), device)
        # All ranks have solved the same; whatever they round is the same then, too.
        rows_CH, bias_C = ranks.from_first((found[0].cpu(), None if found[1] is None else found[1].cpu()))
        fitted = {weight.name: _replaced(weight, changed[weight.name], rows_CH)}
        if bias is not None and bias_C is not None:
            fitted[bias.name] = _replaced(bias, changed[bias.name], bias_C)
        return fitted

    def _run_reduced(self, changed: Mapping[str, Tensor], chosen: Tensor | None) -> _Run:
        with self._layer.reduced(changed) as reduced:
            return self._run(reduced, self._fitted_to.calls, chosen)

    def _run(self, block: RunnableBlock, calls: list[Call], chosen: Tensor | None) -> _Run:
        """Runs the router of a block on some tokens of the block's inputs."""
        if chosen is not None:
            calls = [pick_tokens(calls, self._own.part(chosen))]
        attempts: list[RouterObserver] = []

        def start() -> RouterObserver:
            attempts.append(RouterObserver())
            return attempts[-1]

        stop = watch_router(block.skeleton.module, self._weight, lambda *seen: attempts[-1].on_router(*seen))
        try:
            last = block.rerun(calls, start)
        finally:
            stop()
        seen = (last.top_k, last.weights, last.inputs, last.logits, last.extra)
        return _Run(*(self._together(parts) for parts in seen))

    def _together(self, parts: Sequence[Tensor]) -> Tensor:
        """Rows of all ranks, on the CPU."""
        rows = torch.cat(list(parts))
        return (ranks.joined(rows.to(self._layer.device)) if ranks.is_shared() else rows).cpu()


def _replaced(tensor: ExpertTensor, current: Tensor, rows_C: Tensor) -> Tensor:
    """A tensor with other rows of experts, rounded once to its own dtype."""
    return tensor.join(rows_C.to(current), tensor.split(current)[1])
