"""Option scores and greedy answers to many questions behind cached prefixes, in as few passes as possible."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from kvutils.models import MLM
from kvutils.session_cache import Continuation, Piece, Prefix

_LOGITS_AT_ONCE = 256  # rows of (tokens, vocabulary) held in float32


@dataclass(eq=False)
class Asked:
    """A question as tokens, and what comes of it.

    row: its prompt; head: ids before the question, one per image; ids: of the question; options: label ->
    spellings. Results: tokens, generated before the end token; complete, whether the model ended; scores, per
    label the log-probability that the answer begins with one of its spellings.
    """

    row: int
    question: str
    head: list[int]
    ids: list[int]
    options: dict[str, list[list[int]]]
    tokens: list[int] = field(default_factory=list)
    complete: bool = False
    scores: dict[str, float] = field(default_factory=dict)


def portions(asked: Sequence[Asked], tokens: int) -> Iterator[list[Asked]]:
    """The questions in groups that put at most about `tokens` tokens behind a row's prefix at once."""
    used: dict[int, int] = {}
    groups: dict[int, list[Asked]] = {}
    for one in asked:
        size = len(one.ids) + sum(len(ids) - 1 for spelled in one.options.values() for ids in spelled)
        used[one.row] = used.get(one.row, 0) + size
        groups.setdefault((used[one.row] - 1) // tokens, []).append(one)
    yield from groups.values()


def answer_together(mlm: MLM, prefix: Prefix, asked: Sequence[Asked], max_new_tokens: int) -> None:
    """Fill in the results of questions: one pass for all of them, one for longer options, one per token."""
    state = Continuation(mlm, prefix)
    hidden = state.extend([Piece(one.row, owner, one.ids) for owner, one in enumerate(asked)])
    ends = torch.tensor([len(one.ids) for one in asked]).cumsum(0) - 1
    logits = next_logits(mlm, hidden[ends.to(hidden.device)])
    if any(one.options for one in asked):
        _score(mlm, state, asked, logits)
    if max_new_tokens:
        _decode(mlm, state, asked, logits, max_new_tokens)


def next_logits(mlm: MLM, hidden: torch.Tensor) -> torch.Tensor:
    """(n, vocabulary) float32 of last hidden states (n, C)."""
    return mlm.model.lm_head(hidden).float()


def _score(mlm: MLM, state: Continuation, asked: Sequence[Asked], logits: torch.Tensor) -> None:
    """Sum the log-probabilities of each spelling's tokens; spellings of one label add their probabilities.

    First tokens are read from `logits`; the others from one pass in which each longer spelling is a branch.
    """
    spelled = [
        (owner, label, ids)
        for owner, one in enumerate(asked)
        for label, spellings in one.options.items()
        for ids in spellings
    ]
    owners = torch.tensor([owner for owner, _, _ in spelled], device=logits.device)
    first = torch.tensor([ids[0] for _, _, ids in spelled], device=logits.device)
    scores = logits.log_softmax(-1)[owners, first].tolist()
    longer = [number for number, (_, _, ids) in enumerate(spelled) if len(ids) > 1]
    if longer:
        pieces = []
        for number in longer:
            owner, _, ids = spelled[number]
            one = asked[owner]
            pieces.append(Piece(one.row, owner, ids[:-1], offset=len(one.ids), branch=number + 1))
        hidden = state.fork().extend(pieces)
        targets = torch.tensor([token for number in longer for token in spelled[number][2][1:]])
        rest = []
        for part, wanted in zip(hidden.split(_LOGITS_AT_ONCE), targets.split(_LOGITS_AT_ONCE), strict=True):
            found = next_logits(mlm, part).log_softmax(-1)
            rest += found.gather(1, wanted.to(found.device)[:, None])[:, 0].tolist()
        following = iter(rest)
        for number in longer:
            scores[number] += sum(next(following) for _ in spelled[number][2][1:])
    for (owner, label, _), score in zip(spelled, scores, strict=True):
        found = asked[owner].scores
        found[label] = _log_add(found[label], score) if label in found else score


def _log_add(one: float, two: float) -> float:
    high, low = max(one, two), min(one, two)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def _decode(
    mlm: MLM, state: Continuation, asked: Sequence[Asked], logits: torch.Tensor, max_new_tokens: int
) -> None:
    """Greedy decoding; an answer ends at one of the model's end tokens."""
    settings = mlm.model.generation_config
    ends = settings.eos_token_id
    ends = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
    penalty = settings.repetition_penalty or 1.0
    seen = torch.zeros(logits.shape if penalty != 1 else (0, 0), dtype=torch.bool, device=logits.device)
    for owner in range(len(seen)):
        seen[owner, asked[owner].head + asked[owner].ids] = True
    going = list(range(len(asked)))
    while going:
        if penalty != 1:  # as transformers' RepetitionPenaltyLogitsProcessor
            penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(seen[going], penalised, logits)
        following = []
        for owner, token in zip(going, logits.argmax(-1).tolist(), strict=True):
            one = asked[owner]
            one.complete = token in ends
            if one.complete:
                continue
            one.tokens.append(token)
            if penalty != 1:
                seen[owner, token] = True
            if len(one.tokens) < max_new_tokens:
                following.append(owner)
        going = following
        if going:
            pieces = []
            for owner in going:
                one = asked[owner]
                offset = len(one.ids) + len(one.tokens) - 1
                pieces.append(Piece(one.row, owner, one.tokens[-1:], offset))
            logits = next_logits(mlm, state.extend(pieces))
