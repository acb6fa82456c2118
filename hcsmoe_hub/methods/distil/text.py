"""Which calibration sequences a reduced model is trained on, which judge it, and how they are cut.

B sequences of S tokens, N pieces of L tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# One sequence in eight of every domain.
JUDGE_SHARE = 8
# Short pieces make many steps of a given text; what is trained computes each token alone.
PIECE_TOKENS = 256
# Most tokens that judge, of all domains.
JUDGED_TOKENS = 8192
# Fewest sequences of which some train and some judge.
LEAST_SEQUENCES = 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pieces:
    """Calibration text for the training of a whole model.

    Attributes:
        fitted_NL: Token ids to train on, int64.
        judged: Token ids that judge, ``[N, L]`` int64 by domain.
    """

    fitted_NL: Tensor
    judged: Mapping[str, Tensor]


def judging_sequences(domains: Sequence[str]) -> dict[str, list[int]]:
    """Numbers of the sequences that judge, by domain.

    Of every domain each eighth one judges, or the last one of up to seven. A domain with a single sequence is trained
    on, unless nothing would judge: then the last sequence of all does.

    Args:
        domains: Domain of each of at least ``LEAST_SEQUENCES`` sequences.
    """
    found: dict[str, list[int]] = {}
    for domain in dict.fromkeys(domains):
        own = [number for number, name in enumerate(domains) if name == domain]
        judging = own[JUDGE_SHARE - 1 :: JUDGE_SHARE] or (own[-1:] if len(own) > 1 else [])
        if judging:
            found[domain] = judging
    return found or {domains[-1]: [len(domains) - 1]}


def cut(token_ids_BS: Tensor) -> Tensor:
    """Equal pieces ``[N, L]`` of at most ``PIECE_TOKENS`` tokens; fewer tokens than a sequence has pieces are lost."""
    sequences, length = token_ids_BS.shape
    parts = -(-length // PIECE_TOKENS)
    return token_ids_BS[:, : length // parts * parts].reshape(sequences * parts, length // parts)


def make_pieces(token_ids_BS: Tensor, domains: Sequence[str]) -> Pieces:
    """Splits a calibration set into what a model is trained on and what judges it.

    Args:
        token_ids_BS: ``[B, S]`` int64, with B at least ``LEAST_SEQUENCES``.
        domains: Domain of each sequence.
    """
    judging = judging_sequences(domains)
    everything = {number for numbers in judging.values() for number in numbers}
    fitted = [number for number in range(len(token_ids_BS)) if number not in everything]
    # Every domain counts the same, so none may crowd out the others.
    share = JUDGED_TOKENS // len(judging)
    judged = {domain: _spread(cut(token_ids_BS[numbers]), share) for domain, numbers in judging.items()}
    return Pieces(fitted_NL=cut(token_ids_BS[fitted]), judged=judged)


def _spread(pieces_NL: Tensor, tokens: int) -> Tensor:
    """As many evenly spaced pieces as hold so many tokens, at least one."""
    count = min(len(pieces_NL), max(1, tokens // pieces_NL.shape[1]))
    return pieces_NL[torch.linspace(0, len(pieces_NL) - 1, count).round().long()]
