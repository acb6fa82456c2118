"""Which sequences judge a training, and how they are cut: no domain is judged by text that was trained on."""

import torch

from hcsmoe_hub.methods.distil.text import JUDGED_TOKENS, PIECE_TOKENS, cut, judging_sequences, make_pieces


def test_every_eighth_sequence_of_a_domain_judges() -> None:
    domains = ["prose"] * 17 + ["code"] * 8
    assert judging_sequences(domains) == {"prose": [7, 15], "code": [24]}


def test_the_last_sequence_of_a_small_domain_judges() -> None:
    assert judging_sequences(["prose", "code", "prose", "code", "code"]) == {"prose": [2], "code": [4]}


def test_a_domain_with_a_single_sequence_is_trained_on_where_others_judge() -> None:
    assert judging_sequences(["prose", "code", "prose"]) == {"prose": [2]}


def test_the_last_sequence_judges_where_every_domain_has_one() -> None:
    assert judging_sequences(["prose", "code"]) == {"code": [1]}


def test_sequences_are_cut_into_equal_pieces() -> None:
    ids = torch.arange(2 * 600).view(2, 600)
    pieces = cut(ids)
    assert pieces.shape == (6, 200)
    assert torch.equal(pieces.flatten(), ids.flatten())
    assert cut(ids[:, :10]).shape == (2, 10)
    # One token of 257 is lost.
    assert cut(ids[:, : PIECE_TOKENS + 1]).shape == (4, PIECE_TOKENS // 2)


def test_nothing_that_judges_is_trained_on_and_nothing_else_is_left_out() -> None:
    ids = torch.arange(20 * 8).view(20, 8)
    pieces = make_pieces(ids, ["prose"] * 10 + ["code"] * 10)
    judged = torch.cat(list(pieces.judged.values()))
    assert pieces.judged.keys() == {"prose", "code"}
    assert sorted(torch.cat([pieces.fitted_NL, judged]).flatten().tolist()) == list(range(160))


def test_domains_judge_with_the_same_number_of_tokens_at_most() -> None:
    ids = torch.arange(80 * 2048).view(80, 2048)
    pieces = make_pieces(ids, ["prose"] * 64 + ["code"] * 16)
    assert [found.numel() for found in pieces.judged.values()] == [JUDGED_TOKENS // 2, 2 * 2048]
    assert len(pieces.judged["prose"].unique()) == JUDGED_TOKENS // 2
