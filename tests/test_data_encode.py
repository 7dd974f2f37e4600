"""What is learned: each answer and its end token, nothing else, by the model's own template."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeft.chat import ChatTemplate
from edgeft.data.encode import TooLong, encode, encode_all
from edgeft.data.example import Encoded, Example
from edgeft.errors import DataError, ModelError

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen 3: reasoning of earlier turns disappears.
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Reasoning models: the generation prompt opens a tag that the finished turn does not have.
OPENING = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
ENDLESS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
END = "<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A byte-level BPE with a few merges, as SmolLM2 has."""
    tokenizers = pytest.importorskip("tokenizers")
    result = tokenizers.Tokenizer(tokenizers.models.BPE())
    result.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    result.train_from_iterator(["turn on the light in the kitchen", "user assistant system\n\n think"] * 20, trainer)
    return result


class Reads:
    """A tokenizer with a template; `ids` is the plain callable that encoding takes."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        self.tokenizer, self.template = tokenizer, ChatTemplate(template)

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def encode(self, example: Example, max_tokens: int | None = None) -> Encoded:
        return encode(example, self.template, self.ids, [END], max_tokens)

    def text(self, encoded: Encoded) -> str:
        return str(self.tokenizer.decode(encoded.tokens, skip_special_tokens=False))

    def learned(self, encoded: Encoded) -> str:
        kept = [token for token, learned in zip(encoded.tokens, encoded.learned, strict=True) if learned]
        return str(self.tokenizer.decode(kept, skip_special_tokens=False))


def chat(*turns: str, roles: str = "ua") -> Example:
    names = {"s": "system", "u": "user", "a": "assistant"}
    return Example(
        tuple({"role": names[roles[i % len(roles)]], "content": turn} for i, turn in enumerate(turns)),
    )


def test_answer_and_end_token_are_learned_and_the_newline_is_not(tokenizer: Any) -> None:
    model = Reads(tokenizer, CHATML)
    encoded = model.encode(chat("turn on the light", "done"))
    assert model.learned(encoded) == f"done{END}"
    assert model.text(encoded) == model.template.render(
        chat("turn on the light", "done").messages, add_generation_prompt=False
    ).removesuffix("\n")
    assert encoded.notes == ()


def test_prompt_has_the_tokens_that_a_runtime_feeds(tokenizer: Any) -> None:
    model = Reads(tokenizer, CHATML)
    example = chat("Be short.", "turn on the light", "\n done", roles="sua")
    encoded = model.encode(example)
    prompt = model.ids(model.template.render(example.messages[:-1]))
    assert encoded.tokens[: len(prompt)] == prompt
    assert not any(encoded.learned[: len(prompt)]) and all(encoded.learned[len(prompt) :])


def test_every_assistant_turn_is_learned(tokenizer: Any) -> None:
    model = Reads(tokenizer, CHATML)
    assert model.learned(model.encode(chat("a", "one", "b", "two"))) == f"one{END}two{END}"


def test_turn_of_weight_zero_is_read_only(tokenizer: Any) -> None:
    model = Reads(tokenizer, CHATML)
    messages = chat("a", "one", "b", "two").messages
    encoded = model.encode(Example((messages[0], {**messages[1], "weight": 0}, *messages[2:])))
    assert model.learned(encoded) == f"two{END}"
    with pytest.raises(DataError, match="no assistant turn that is learned"):
        model.encode(Example((messages[0], {**messages[1], "weight": 0})))


def test_rewritten_history_leaves_the_last_turn(tokenizer: Any) -> None:
    model = Reads(tokenizer, REWRITING)
    encoded = model.encode(chat("a", "<think>x</think>one", "b", "<think>y</think>two"))
    assert encoded.notes == ("history-rewritten",)
    assert model.learned(encoded) == f"<think>y</think>two{END}"
    assert "x" not in model.text(encoded)
    assert model.encode(chat("a", "one", "b", "two")).notes == (), "nothing to rewrite here"


def test_generation_prompt_that_the_finished_turn_lacks(tokenizer: Any) -> None:
    model = Reads(tokenizer, OPENING)
    encoded = model.encode(chat("a", "one"))
    assert set(encoded.notes) == {"generation-prompt-rewritten", "end-token-added"}
    assert model.text(encoded).endswith(f"<|im_start|>assistant\n<think>\none{END}")
    assert model.learned(encoded) == f"one{END}"


def test_template_without_end_gets_one(tokenizer: Any) -> None:
    model = Reads(tokenizer, ENDLESS)
    encoded = model.encode(chat("a", "one"))
    assert encoded.notes == ("end-token-added",) and model.learned(encoded) == f"one{END}"


def test_text_is_learned_whole(tokenizer: Any) -> None:
    model = Reads(tokenizer, CHATML)
    encoded = model.encode(Example(text="turn on"))
    assert all(encoded.learned) and model.text(encoded) == f"turn on{END}"
    with pytest.raises(DataError, match="empty"):
        model.encode(Example(text=" \n"))


def test_no_answer_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="nothing would be learned"):
        Reads(tokenizer, CHATML).encode(chat("a"))


def test_refusing_template_is_a_model_error(tokenizer: Any) -> None:
    with pytest.raises(ModelError, match="no system here"):
        Reads(tokenizer, "{{ raise_exception('no system here') }}").encode(chat("a", "b"))


def test_too_long_is_cut_by_whole_turns_or_refused(tokenizer: Any) -> None:
    model = Reads(tokenizer, CHATML)
    example = chat("a", "one", "b", "two " * 50)
    first = model.encode(chat("a", "one"))
    cut = model.encode(example, max_tokens=len(first.tokens) + 5)
    assert cut.tokens == first.tokens and cut.notes == ("turns-cut",)
    with pytest.raises(TooLong) as error:
        model.encode(example, max_tokens=len(first.tokens) - 1)
    assert error.value.tokens == len(first.tokens)


def test_many_examples_list_what_is_left_out_and_window_text(tokenizer: Any) -> None:
    model = Reads(tokenizer, CHATML)
    text = Example(text="turn on the light " * 30)
    examples = [chat("a", "b"), chat("a " * 200, "b"), text]
    result = encode_all(examples, model.template, model.ids, [END], 40)
    assert [index for index, _ in result.too_long] == [1]
    windows = result.encoded[1:]
    assert [token for window in windows for token in window.tokens] == model.encode(text).tokens
    assert max(len(window.tokens) for window in windows) <= 40
    with pytest.raises(DataError, match="longer than 10 tokens"):
        encode_all(examples[1:2], model.template, model.ids, [END], 10)


def test_sentencepiece_style_prefix_space_is_not_inserted_into_the_answer() -> None:
    """A tokenizer that begins every text with a space: alone, the answer would get one too."""

    def ids(text: str) -> list[int]:
        return [ord(character) for character in " " + text]

    template = ChatTemplate(
        "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}[{% endif %}"
    )
    encoded = encode(chat("q", "a"), template, ids, ["]"])
    assert "".join(map(chr, encoded.tokens)) == " [q][a]"


content = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs"], exclude_characters="\0<>|"), min_size=1, max_size=30
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    turns=st.lists(st.tuples(content, content), min_size=1, max_size=4), template=st.sampled_from([CHATML, REWRITING])
)
def test_mask_invariants(tokenizer: Any, turns: list[tuple[str, str]], template: str) -> None:
    model = Reads(tokenizer, template)
    example = chat(*(text for turn in turns for text in turn))
    encoded = model.encode(example)
    assert len(encoded.tokens) == len(encoded.learned)
    assert encoded.learned[-1] and encoded.tokens[-1] == tokenizer.token_to_id(END)
    assert model.learned(encoded) == "".join(answer + END for _, answer in turns)
    whole = model.template.render(example.messages, add_generation_prompt=False)
    assert model.text(encoded) == whole.removesuffix("\n")


@pytest.mark.model
def test_same_tokens_as_transformers_on_smollm2(smollm2_hf: Path) -> None:
    from edgeft.data.load import load_split
    from edgeft.models.text import load_text_side

    transformers = pytest.importorskip("transformers")
    side = load_text_side(smollm2_hf)
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2_hf)
    examples = load_split("smart-home", "test")
    encoded = encode_all(examples, side.need_template(), side.tokenize, side.eos_tokens).encoded
    for example, mine in zip(examples, encoded, strict=True):
        reference = theirs.apply_chat_template(list(example.messages), tokenize=True, return_dict=False)
        assert reference == mine.tokens + side.tokenize("\n")
        answer = [token for token, learned in zip(mine.tokens, mine.learned, strict=True) if learned]
        assert theirs.decode(answer) == example.messages[-1]["content"] + END
