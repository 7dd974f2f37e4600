"""From an example to token ids and the mask of what is learned, by the model's own chat template.

A conversation is rendered with `edgeft.chat.ChatTemplate`. Each assistant turn is learned from right after its
generation prompt up to and including its end-of-turn token; whatever the template writes after that token (a newline,
mostly) is not learned. The prompt has exactly the tokens a runtime will feed: it is tokenized alone, and the answer
follows it.

Four cases are not plain, and are told in `Encoded.notes`:

history-rewritten
    The template renders earlier turns differently once they are history (Qwen 3 removes old reasoning). What such a
    turn looked like when it was generated is not in the text any more, so only the last assistant turn is learned.
generation-prompt-rewritten
    The generation prompt is not a beginning of the finished turn (templates that open `<think>` for the model). The
    answer is learned right after the generation prompt: that is where the model will stand.
end-token-added
    The template closes no turn; the first end token was added, or the model would never learn to stop.
turns-cut
    Longer than `max_tokens`: the last turns were left out. When not even the first answer fits, `TooLong` is raised:
    cutting the beginning of a prompt would teach answers to questions that the model cannot see.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from edgeft.chat import ChatTemplate, Message
from edgeft.data.example import Encoded, Example, Note
from edgeft.errors import DataError

Tokenize = Callable[[str], list[int]]
"""Text to token ids: special tokens in the text are recognised, none is added."""


class TooLong(DataError):
    """Not even the first answer fits into the context; `tokens` would be needed."""

    def __init__(self, tokens: int, max_tokens: int) -> None:
        super().__init__(
            f"an example needs {tokens} tokens up to the end of its first answer; {max_tokens} are allowed",
            "Raise the maximum length, or shorten the prompt.",
        )
        self.tokens = tokens


@dataclass(frozen=True)
class _Turn:
    """An assistant turn as text: what is read before it, and what is learned."""

    prompt: str
    answer: str


@dataclass
class EncodedSet:
    """Everything that a list of examples became."""

    encoded: list[Encoded] = field(default_factory=list)
    too_long: list[tuple[int, int]] = field(default_factory=list)
    """(index of the example, tokens it needs) of those left out."""
    notes: Counter[Note] = field(default_factory=Counter)


def encode(
    example: Example,
    template: ChatTemplate,
    tokenize: Tokenize,
    eos_tokens: Sequence[str],
    max_tokens: int | None = None,
) -> Encoded:
    """Token ids of one example, and which of them are learned.

    Args:
        eos_tokens: text of every token that ends a turn, the usual one first; from `generation_config.json` too.
        max_tokens: longest sequence; None for no limit.

    Raises:
        TooLong: when the first answer ends after `max_tokens`.
        DataError: when nothing would be learned.
        ModelError: when the template refuses the conversation.
    """
    if example.text is not None:
        tokens = _encode_text(example.text, tokenize, eos_tokens)
        if max_tokens is not None and len(tokens) > max_tokens:
            raise TooLong(len(tokens), max_tokens)
        return Encoded(tokens, [True] * len(tokens))
    turns, notes = _turns(example, template, eos_tokens)
    return _encode_turns(turns, notes, tokenize, max_tokens)


def encode_all(
    examples: Iterable[Example],
    template: ChatTemplate,
    tokenize: Tokenize,
    eos_tokens: Sequence[str],
    max_tokens: int | None = None,
) -> EncodedSet:
    """Encode many examples: long text goes into several sequences, and what cannot fit is listed.

    Raises:
        DataError: when no example is left, or one has nothing to learn.
    """
    result = EncodedSet()
    for index, example in enumerate(examples):
        try:
            pieces = list(_pieces(example, template, tokenize, eos_tokens, max_tokens))
        except TooLong as error:
            result.too_long.append((index, error.tokens))
            continue
        result.encoded += pieces
        result.notes.update(note for piece in pieces for note in piece.notes)
    if not result.encoded:
        longest = max((tokens for _, tokens in result.too_long), default=0)
        reason = (
            f"every one of {len(result.too_long)} is longer than {max_tokens} tokens" if longest else "there is none"
        )
        raise DataError(f"no example to encode: {reason}", f"The longest needs {longest} tokens." if longest else None)
    return result


def _pieces(
    example: Example, template: ChatTemplate, tokenize: Tokenize, eos_tokens: Sequence[str], max_tokens: int | None
) -> Iterator[Encoded]:
    if example.text is None or max_tokens is None:
        yield encode(example, template, tokenize, eos_tokens, max_tokens)
        return
    tokens = _encode_text(example.text, tokenize, eos_tokens)
    for start in range(0, len(tokens), max_tokens):
        window = tokens[start : start + max_tokens]
        yield Encoded(window, [True] * len(window))


def _encode_text(text: str, tokenize: Tokenize, eos_tokens: Sequence[str]) -> list[int]:
    if not text.strip():
        raise DataError("an example's text is empty: nothing would be learned")
    return tokenize(text + eos_tokens[0] if eos_tokens else text)


def _turns(example: Example, template: ChatTemplate, eos_tokens: Sequence[str]) -> tuple[list[_Turn], list[Note]]:
    """The learned turns of a conversation, each with the whole text before it."""
    messages, tools = example.messages, example.tools or None
    places = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not places or places[-1] != len(messages) - 1:
        raise DataError("a conversation does not end with an assistant turn: nothing would be learned")
    full = [template.render(messages[: at + 1], add_generation_prompt=False, tools=tools) for at in places]
    prompts = [template.render(messages[:at], tools=tools) for at in places]
    notes: list[Note] = []
    if not all(text.startswith(prompt) for text, prompt in zip(full, prompts, strict=True)):
        notes.append("generation-prompt-rewritten")
        full = [prompt + _content(messages[at]) for prompt, at in zip(prompts, places, strict=True)]
    answers = [_answer(text[len(prompt) :], eos_tokens) for text, prompt in zip(full, prompts, strict=True)]
    if any(added for _, added in answers):
        notes.append("end-token-added")
    turns = [_Turn(prompt, answer) for prompt, (answer, _) in zip(prompts, answers, strict=True)]
    learned = [turn for turn, at in zip(turns, places, strict=True) if messages[at].get("weight", 1) != 0]
    if not any(turn.answer for turn in learned):
        raise DataError("an example has no assistant turn that is learned", "Give one of them a weight above 0.")
    if not all(after.prompt.startswith(turn.prompt + turn.answer) for turn, after in itertools.pairwise(turns)):
        return learned[-1:], ["history-rewritten", *notes]
    return learned, notes


def _content(message: Message) -> str:
    content = message.get("content")
    if not isinstance(content, str) or not content:
        raise DataError("an answer without text cannot follow this template's generation prompt")
    return content


def _answer(text: str, eos_tokens: Sequence[str]) -> tuple[str, bool]:
    """The text up to its end token, and whether that had to be added."""
    ends = [text.rfind(token) + len(token) for token in eos_tokens if token and token in text]
    if ends:
        return text[: max(ends)], False
    return text.rstrip("\n") + (eos_tokens[0] if eos_tokens else ""), bool(eos_tokens)


def _encode_turns(turns: list[_Turn], notes: list[Note], tokenize: Tokenize, max_tokens: int | None) -> Encoded:
    tokens: list[int] = []
    learned: list[bool] = []
    text = ""
    for number, turn in enumerate(turns):
        prompt = _continue(tokens, text, turn.prompt[len(text) :], tokenize)
        answer = _continue(tokens + prompt, turn.prompt, turn.answer, tokenize)
        needed = len(tokens) + len(prompt) + len(answer)
        if max_tokens is not None and needed > max_tokens:
            if number == 0:
                raise TooLong(needed, max_tokens)
            notes = [*notes, "turns-cut"]
            break
        tokens = tokens + prompt + answer
        learned += [False] * len(prompt) + [True] * len(answer)
        text = turn.prompt + turn.answer
    return Encoded(tokens, learned, tuple(notes))


def _continue(tokens: list[int], text: str, addition: str, tokenize: Tokenize) -> list[int]:
    """Tokens of `addition` after `text`, whose tokens are given and stay as they are.

    SentencePiece tokenizers put a space before a text that stands alone, so the addition is read in its context; only
    where its first character would merge into the last token of the text does it stand alone.
    """
    whole = tokenize(text + addition)
    if whole[: len(tokens)] == tokens:
        return whole[len(tokens) :]
    return tokenize(addition)
