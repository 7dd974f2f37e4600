"""Answers to a few held-out prompts while a model is trained: what a loss does not show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from edgeft.data.example import Encoded
from edgeft.train.batch import collate

ANSWER_TOKENS = 48
"""At most: all answers grow by one token per forward pass, which computes their prompts again."""
_LONGER = 8
"""Tokens that an answer may have beyond the wanted one: enough to see that it does not end."""


@dataclass(frozen=True)
class Prompt:
    """The beginning of a held-out example, and how it goes on."""

    tokens: list[int]
    wanted: list[int]


def prompts(examples: Sequence[Encoded], count: int, longest: int) -> list[Prompt]:
    """`count` examples, evenly spaced, cut before what is learned; a plain text is cut in its middle.

    Args:
        longest: tokens that prompt and answer may have together; longer examples are passed over.
    """
    fitting = [example for example in examples if 2 <= len(example.tokens) <= longest - ANSWER_TOKENS]
    chosen = [fitting[at * len(fitting) // count] for at in range(min(count, len(fitting)))]
    return [Prompt(one.tokens[: _cut(one)], one.tokens[_cut(one) :]) for one in chosen]


def _cut(example: Encoded) -> int:
    first = example.learned.index(True) if any(example.learned) else 0
    return first if first > 1 else len(example.tokens) // 2


def answers(model: Any, asked: Sequence[Prompt], stops: set[int], autocast: torch.dtype | None) -> list[list[int]]:
    """Greedy answers of the graph that is trained, each up to a stop token; the model's mode is left as it was.

    Nothing random is drawn: a run with samples computes what it computes without them.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    device, training = next(model.parameters()).device, model.training
    model.eval()
    found: list[list[int]] = [[] for _ in asked]
    open_ones = list(range(len(asked)))
    with torch.no_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        for _ in range(ANSWER_TOKENS):
            if not open_ones:
                break
            texts = [asked[at].tokens + found[at] for at in open_ones]
            for at, token in zip(open_ones, _next_tokens(inner, texts, device), strict=True):
                found[at].append(token)
            open_ones = [
                at
                for at in open_ones
                if found[at][-1] not in stops and len(found[at]) < len(asked[at].wanted) + _LONGER
            ]
    model.train(training)
    return [[token for token in answer if token not in stops] for answer in found]


def _next_tokens(inner: Any, texts: Sequence[list[int]], device: torch.device) -> list[int]:
    """The most probable token after each text; all of them are computed in one row."""
    batch = collate([Encoded(text, [False] * len(text)) for text in texts])
    ends = torch.tensor([len(text) for text in texts]).cumsum(0) - 1
    logits = inner(
        input_ids=batch["input_ids"].to(device),
        position_ids=batch["position_ids"].to(device),
        documents=batch["documents"].to(device),
        use_cache=False,
        logits_to_keep=ends.to(device),
    ).logits[0]
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    return tokens


def sampled(model: Any, tokenizer: Any, asked: Sequence[Prompt], autocast: torch.dtype | None) -> list[dict[str, str]]:
    """Prompt, wanted and given answer as text, for `events.jsonl`."""
    stops = {one.wanted[-1] for one in asked} | {tokenizer.eos_token_id}
    given = answers(model, asked, stops, autocast)
    return [
        {
            "prompt": _text(tokenizer, one.tokens),
            "wanted": _text(tokenizer, one.wanted),
            "answer": _text(tokenizer, got),
        }
        for one, got in zip(asked, given, strict=True)
    ]


def _text(tokenizer: Any, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
