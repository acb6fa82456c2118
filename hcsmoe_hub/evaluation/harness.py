"""A checkpoint as a model of lm-eval. Importing this module imports lm-eval, an optional library.

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

# What lm-eval assumes of a model whose config names no limit.
_DEFAULT_POSITIONS = 2048

# Text of context and continuation, and the ids of both.
Scored = tuple[Any, Sequence[int], Sequence[int]]


class ScorerLM(TemplateLM):
    """Answers the likelihood requests of tasks, in memory or layer by layer, as lm-eval's own model does.

    Args:
        scorer: What is measured.
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
        """Ids of a text, with the special tokens that the tokenizer adds unless they were written out or refused."""
        begin = self._tokens.tokenizer.decode([self._tokens.first])
        is_plain = add_special_tokens is False or (add_special_tokens is None and string.startswith(begin))
        return self._tokens.encode(string) if is_plain else self._tokens.tokenizer(string, verbose=False)["input_ids"]

    def _loglikelihood_tokens(self, requests: Sequence[Scored], **kwargs: Any) -> list[tuple[float, bool]]:
        """Summed log-likelihood of each continuation, and whether it is what greedy decoding would have said."""
        asked = []
        for _, context, continuation in requests:
            ids = [*context, *continuation][-(self._max_positions + 1) :]
            if len(continuation) >= len(ids):
                raise PlanError(
                    f"a task asks for the likelihood of {len(continuation)} tokens at once, and the model takes "
                    f"{self._max_positions}.",
                    hint="leave that task out",
                )
            asked.append(Request(ids[:-1], len(ids) - 1 - len(continuation)))
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for index, logits_SV in self._scorer.logits(asked):
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
        """Refuses: only likelihoods can be had from a model whose layers pass one at a time.

        Raises:
            PlanError: Always.
        """
        raise PlanError(
            "one of the tasks lets the model write text; only tasks that compare likelihoods are supported.",
            hint="leave that task out, or run it with lm-eval itself",
        )
