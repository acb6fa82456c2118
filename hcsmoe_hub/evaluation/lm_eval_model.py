"""A checkpoint as an lm-eval model. Importing this module imports lm-eval, an optional dependency.

S positions, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.evaluation.scorer import Request, Scorer
from hcsmoe_hub.evaluation.tokens import Tokens

# What lm-eval assumes for a model whose config does not state a maximum length.
_DEFAULT_POSITIONS = 2048

# Text of context and continuation, and the ids of both.
Scored = tuple[Any, Sequence[int], Sequence[int]]


class ScorerLM(TemplateLM):
    """Computes the likelihoods that tasks request, like lm-eval's own model, in memory or layer by layer.

    Args:
        scorer: The model to measure.
        tokens: Its tokenizer.
    """

    def __init__(self, scorer: Scorer, tokens: Tokens) -> None:
        super().__init__()
        self._scorer = scorer
        self._tokens = tokens
        self._max_positions = scorer.checkpoint.max_positions or _DEFAULT_POSITIONS
        self.tokenizer = tokens.tokenizer

    @property
    def eot_token_id(self) -> int:
        return self._tokens.first if self._tokens.last is None else self._tokens.last

    @property
    def prefix_token_id(self) -> int:
        return self._tokens.first

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, with the tokenizer's special tokens unless the text begins with one or they are disabled."""
        begin = self._tokens.tokenizer.decode([self._tokens.first])
        is_plain = add_special_tokens is False or (add_special_tokens is None and string.startswith(begin))
        return self._tokens.encode(string, add_special_tokens=not is_plain)

    def _loglikelihood_tokens(self, requests: Sequence[Scored], **kwargs: Any) -> list[tuple[float, bool]]:
        """Summed log-likelihood of each continuation, and whether greedy decoding would produce it."""
        wanted = []
        for _, context, continuation in requests:
            ids = [*context, *continuation][-(self._max_positions + 1) :]
            if len(continuation) >= len(ids):
                raise PlanError(
                    f"a task needs the likelihood of {len(continuation)} tokens at once, but the model accepts at most "
                    f"{self._max_positions}.",
                    hint="omit that task",
                )
            wanted.append(Request(ids[:-1], len(ids) - 1 - len(continuation)))
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for index, logits_SV in self._scorer.logits(wanted):
            targets_S = torch.tensor(list(requests[index][2]), dtype=torch.long)
            log_probs_S = F.log_softmax(logits_SV, dim=-1).gather(1, targets_S[:, None])
            is_greedy = bool((logits_SV.argmax(-1) == targets_S).all())
            answers[index] = (float(log_probs_S.double().sum()), is_greedy)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, cut into windows that do not overlap."""
        totals = []
        for (text,) in [request.args for request in requests]:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._max_positions,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(score for score, _ in self._loglikelihood_tokens(parts)))
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Not supported: text generation would read all layers for every token.

        Raises:
            PlanError: Always.
        """
        raise PlanError(
            "one of the tasks generates text; only tasks that compare likelihoods are supported.",
            hint="omit that task, or run it with lm-eval itself",
        )
