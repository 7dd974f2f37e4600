"""What a GGUF says about a model, from the model's own files."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import reference
from edgeft.converters.gguf_metadata import metadata, stop_token_ids
from edgeft.converters.gguf_pretokenizers import recognise
from edgeft.converters.gguf_vocab import TokenType
from edgeft.converters.rope import rope_parameters

from edgeft.errors import ModelError, UnsupportedModel

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS = {"type": "Digits", "individual_digits": True}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
BYTES_ONLY = {**BYTE_LEVEL, "use_regex": False}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


SMOLLM = sequence(DIGITS, BYTE_LEVEL)


def added(id_: int, content: str, special: bool = True) -> dict[str, Any]:
    return {"id": id_, "content": content, "special": special, "normalized": False, "lstrip": False, "rstrip": False}


TOKENIZER: dict[str, Any] = {
    "added_tokens": [added(0, "<|endoftext|>"), added(1, "<|im_end|>"), added(7, "<tool>", special=False)],
    "normalizer": None,
    "pre_tokenizer": SMOLLM,
    "post_processor": None,
    "model": {
        "type": "BPE",
        "vocab": {"<|endoftext|>": 0, "<|im_end|>": 1, "a": 2, "b": 3, "Ġ": 4, "ab": 5, "Ġab": 6},
        "merges": [["a", "b"], ["Ġ", "ab"]],
    },
}
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": 10,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}


class Model:
    """A model folder whose files a test changes before it reads the metadata."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = dict(CONFIG)
        self.write("tokenizer.json", TOKENIZER)
        self.write("tokenizer_config.json", {"eos_token": "<|im_end|>", "chat_template": "{{ messages }}"})

    def write(self, name: str, content: Any) -> None:
        (self.path / name).write_text(content if isinstance(content, str) else json.dumps(content))

    def tokenizer(self, **changes: Any) -> None:
        self.write("tokenizer.json", {**TOKENIZER, **changes})

    def bpe(self, **changes: Any) -> None:
        self.tokenizer(model={**TOKENIZER["model"], **changes})

    def read(self, **options: Any) -> dict[str, Any]:
        return {pair.key: pair.value for pair in metadata(self.path, self.config, **options)}


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return Model(tmp_path)


# --- The pre-tokenizer's name -------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "ignore_merges", "name"),
    [
        (SMOLLM, False, "smollm"),
        (sequence(split(r"\p{N}"), BYTE_LEVEL), False, "smollm"),
        (BYTE_LEVEL, False, "gpt-2"),
        (sequence(split(WORDS % "{1,3}"), BYTES_ONLY), True, "llama-bpe"),
        (sequence(split(WORDS % "{1,3}"), BYTES_ONLY), False, "smaug-bpe"),
        (sequence(split(WORDS % ""), BYTES_ONLY), False, "deepseek-r1-qwen"),
    ],
)
def test_the_pre_tokenizer_is_recognised_by_its_rules(rules: Any, ignore_merges: bool, name: str) -> None:
    assert recognise({"pre_tokenizer": rules, "model": {"ignore_merges": ignore_merges}}, "here") == name


def test_a_name_says_whether_characters_are_composed(model: Model) -> None:
    rules = sequence(split(WORDS % ""), BYTES_ONLY)
    model.tokenizer(pre_tokenizer=rules, normalizer={"type": "NFC"})
    assert model.read()["tokenizer.ggml.pre"] == "qwen2"
    model.tokenizer(pre_tokenizer=rules, normalizer={"type": "Sequence", "normalizers": []})
    assert model.read()["tokenizer.ggml.pre"] == "deepseek-r1-qwen"


def test_a_normalization_that_llama_cpp_lacks_is_refused(model: Model) -> None:
    model.tokenizer(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]})
    with pytest.raises(UnsupportedModel, match=r"changes text before it splits.*Lowercase"):
        model.read()


def test_a_fine_tune_that_adds_a_token_keeps_its_pre_tokenizer(model: Model) -> None:
    model.tokenizer(added_tokens=[*TOKENIZER["added_tokens"], added(8, "<|new|>")])
    assert model.read()["tokenizer.ggml.pre"] == "smollm"


def test_unknown_rules_are_refused_and_the_hint_says_how_to_go_on(model: Model) -> None:
    model.tokenizer(pre_tokenizer=sequence(split("[a-z]+"), BYTES_ONLY))
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.json splits text by rules .*\[a-z\]\+") as caught:
        model.read()
    assert "--tokenizer-pre" in (caught.value.hint or "")
    assert model.read(tokenizer_pre="gpt-2")["tokenizer.ggml.pre"] == "gpt-2"


def test_an_imported_model_keeps_the_name_its_gguf_had(model: Model) -> None:
    model.tokenizer(pre_tokenizer=BYTE_LEVEL)
    model.write("edgeft.json", {"tokenizer_pre": "smollm"})
    assert model.read()["tokenizer.ggml.pre"] == "smollm"
    assert model.read(tokenizer_pre="starcoder")["tokenizer.ggml.pre"] == "starcoder"


# --- Byte-level vocabularies --------------------------------------------------


def test_rows_without_a_token_are_unused(model: Model) -> None:
    read = model.read()
    assert read["tokenizer.ggml.tokens"][6:] == ["Ġab", "<tool>", "[PAD8]", "[PAD9]"]
    assert read["tokenizer.ggml.token_type"][6:] == [
        TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED, TokenType.UNUSED
    ]  # fmt: skip
    assert read["llama.vocab_size"] == 10


def test_a_resized_embedding_decides_the_number_of_rows(model: Model) -> None:
    read = model.read(rows=12)
    assert len(read["tokenizer.ggml.tokens"]) == read["llama.vocab_size"] == 12


def test_merges_are_the_same_in_both_forms(model: Model) -> None:
    pairs = model.read()["tokenizer.ggml.merges"]
    model.bpe(merges=["a b", "Ġ ab"])
    assert model.read()["tokenizer.ggml.merges"] == pairs == ["a b", "Ġ ab"]


def test_a_space_inside_a_merge_cannot_be_taken_for_the_separator(model: Model) -> None:
    model.bpe(merges=[["a ", "b"]])
    assert model.read()["tokenizer.ggml.merges"] == ["aĠ b"]


def test_tokens_that_look_special_are_control_tokens(model: Model) -> None:
    model.tokenizer(added_tokens=[added(7, "<|tool_call|>", special=False)])
    assert model.read()["tokenizer.ggml.token_type"][7] == TokenType.CONTROL


def test_an_ordinary_token_is_not_offered_to_llama_cpp_as_an_end(model: Model) -> None:
    model.bpe(vocab={**TOKENIZER["model"]["vocab"], "</s>": 8})
    read = model.read()
    assert read["tokenizer.ggml.tokens"][8] == "[PAD8]"
    assert read["tokenizer.ggml.token_type"][8] == TokenType.UNUSED


def test_an_ordinary_token_that_really_ends_answers_stays(model: Model) -> None:
    model.bpe(vocab={**TOKENIZER["model"]["vocab"], "</s>": 8})
    model.write("generation_config.json", {"eos_token_id": [1, 8]})
    assert model.read()["tokenizer.ggml.tokens"][8] == "</s>"


def test_an_added_token_keeps_its_name_whatever_it_is(model: Model) -> None:
    model.tokenizer(added_tokens=[*TOKENIZER["added_tokens"], added(8, "</s>", special=False)])
    assert model.read()["tokenizer.ggml.tokens"][8] == "</s>"


def test_more_tokens_than_rows_is_an_error(model: Model) -> None:
    model.config["vocab_size"] = 7
    with pytest.raises(ModelError, match="ids up to 7, but the embedding has only 7 rows"):
        model.read()


def test_two_tokens_with_one_text_are_an_error(model: Model) -> None:
    model.tokenizer(added_tokens=[*TOKENIZER["added_tokens"], added(8, "ab")])
    with pytest.raises(ModelError, match="ids 5 and 8 the same text 'ab'"):
        model.read()


def test_a_folder_without_tokenizer_is_an_error(model: Model) -> None:
    (model.path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        model.read()
    with pytest.raises(ModelError, match="has no tokenizer"):
        stop_token_ids(model.path)


def test_damaged_json_names_the_file(model: Model) -> None:
    model.write("tokenizer.json", '{"model": {')
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        model.read()


def test_a_unigram_tokenizer_is_refused(model: Model) -> None:
    model.bpe(type="Unigram")
    with pytest.raises(UnsupportedModel, match="Unigram"):
        model.read()


def test_an_adapter_may_bring_the_tokenizer(model: Model, tmp_path_factory: pytest.TempPathFactory) -> None:
    adapter = tmp_path_factory.mktemp("adapter")
    tokenizer = {**TOKENIZER, "added_tokens": [*TOKENIZER["added_tokens"], added(8, "<|new|>")]}
    (adapter / "tokenizer.json").write_text(json.dumps(tokenizer))
    (adapter / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    assert model.read(tokenizer_dir=adapter)["tokenizer.ggml.tokens"][8] == "<|new|>"


# --- Special tokens -----------------------------------------------------------


def template(*tokens: str) -> dict[str, Any]:
    parts = [{"Sequence": {"id": "A"}} if token == "A" else {"SpecialToken": {"id": token}} for token in tokens]
    return {"type": "TemplateProcessing", "single": parts, "pair": []}


@pytest.mark.parametrize(
    ("processor", "bos", "eos"),
    [
        (None, False, None),
        ({"type": "ByteLevel"}, False, False),
        (template("<|endoftext|>", "A"), True, None),
        (template("A", "<|im_end|>"), False, True),
        ({"type": "Sequence", "processors": [{"type": "ByteLevel"}, template("<|endoftext|>", "A")]}, True, False),
    ],
)
def test_bos_and_eos_are_added_where_the_post_processor_adds_them(
    model: Model, processor: Any, bos: bool, eos: bool | None
) -> None:
    model.tokenizer(post_processor=processor)
    read = model.read()
    assert read["tokenizer.ggml.add_bos_token"] is bos
    assert read.get("tokenizer.ggml.add_eos_token") is eos


def test_the_tokenizers_word_counts_before_the_models(model: Model) -> None:
    model.config |= {"eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}
    read = model.read()
    assert read["tokenizer.ggml.eos_token_id"] == 1
    assert read["tokenizer.ggml.bos_token_id"] == 0
    assert read["tokenizer.ggml.padding_token_id"] == 0


def test_stop_ids_come_from_every_file(model: Model) -> None:
    model.write("generation_config.json", {"eos_token_id": [0, 7]})
    model.write("config.json", {"eos_token_id": 5})
    assert stop_token_ids(model.path) == (1, 0, 7, 5)


def test_stop_ids_that_llama_cpp_does_not_know_get_a_place(model: Model) -> None:
    # <|endoftext|> (0) is an end by its name; <tool> (7) and "ab" (5) are not.
    model.write("generation_config.json", {"eos_token_id": [0, 7, 5]})
    read = model.read()
    assert read["tokenizer.ggml.eos_token_id"] == 1
    assert read["tokenizer.ggml.eot_token_id"] == 7
    assert read["tokenizer.ggml.eom_token_id"] == 5


def test_eos_itself_needs_no_second_place(model: Model) -> None:
    model.write("tokenizer_config.json", {"eos_token": "<tool>"})
    model.write("generation_config.json", {"eos_token_id": [7, 5]})
    read = model.read()
    assert read["tokenizer.ggml.eos_token_id"] == 7
    assert read["tokenizer.ggml.eot_token_id"] == 5
    assert "tokenizer.ggml.eom_token_id" not in read


def test_stop_ids_without_a_place_are_reported(model: Model) -> None:
    model.write("generation_config.json", {"eos_token_id": [7, 5, 6]})
    warnings: list[str] = []
    model.read(warn=warnings.append)
    assert warnings == ["a GGUF has no place for the stop tokens Ġab; only edgeft will stop there"]


def test_a_stop_id_outside_the_vocabulary_is_an_error(model: Model) -> None:
    model.write("generation_config.json", {"eos_token_id": 99})
    with pytest.raises(ModelError, match="id 99, but the vocabulary has 10 tokens"):
        model.read()


def test_a_model_that_never_stops_is_an_error(model: Model) -> None:
    model.write("tokenizer_config.json", {})
    with pytest.raises(ModelError, match="which token ends an answer"):
        model.read()


# --- Chat templates -----------------------------------------------------------


def test_the_fresh_template_counts_before_the_stale_field(model: Model) -> None:
    assert model.read()["tokenizer.chat_template"] == "{{ messages }}"
    model.write("chat_template.jinja", "fresh")
    assert model.read()["tokenizer.chat_template"] == "fresh"
    assert model.read(chat_template="training's")["tokenizer.chat_template"] == "training's"


def test_named_templates_travel_along(model: Model) -> None:
    choices = [{"name": "default", "template": "d"}, {"name": "tool use", "template": "t"}]
    model.write("tokenizer_config.json", {"eos_token": "<|im_end|>", "chat_template": choices})
    read = model.read(chat_template="training's")
    assert read["tokenizer.chat_template"] == "training's"
    assert read["tokenizer.chat_template.tool_use"] == "t"
    assert read["tokenizer.chat_templates"] == ["tool_use"]


def test_a_missing_template_is_reported(model: Model) -> None:
    model.write("tokenizer_config.json", {"eos_token": "<|im_end|>"})
    warnings: list[str] = []
    assert "tokenizer.chat_template" not in model.read(warn=warnings.append)
    assert "no chat template" in warnings[0]


# --- Architecture -------------------------------------------------------------


def test_an_unknown_architecture_is_refused(model: Model) -> None:
    model.config["model_type"] = "mamba"
    with pytest.raises(UnsupportedModel, match="mamba"):
        model.read()


def test_a_missing_size_names_the_key(model: Model) -> None:
    del model.config["hidden_size"]
    with pytest.raises(ModelError, match=r"config\.json has no hidden_size"):
        model.read()


def test_rope_settings_are_the_same_in_both_generations_of_configs() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0}
    old = {"rope_theta": 5e5, "rope_scaling": scaling}
    new = {"rope_parameters": {**scaling, "rope_theta": 5e5}}
    filled = {"rope_theta": 5e5, "original_max_position_embeddings": 8192}
    assert rope_parameters(old) == rope_parameters(new) == {**scaling, **filled}
    assert rope_parameters({"rope_scaling": {"type": "linear", "factor": 2.0}})["rope_type"] == "linear"


def test_yarn_travels_along(model: Model) -> None:
    model.config["rope_scaling"] = {"type": "yarn", "factor": 4.0, "beta_fast": 32.0}
    read = model.read()
    assert read["llama.rope.scaling.type"] == "yarn"
    assert read["llama.rope.scaling.factor"] == 4.0
    assert read["llama.rope.scaling.original_context_length"] == 512
    assert read["llama.rope.scaling.yarn_beta_fast"] == 32.0


def test_rope_scaling_that_llama_cpp_would_ignore_is_refused(model: Model) -> None:
    model.config["rope_scaling"] = {"rope_type": "dynamic", "factor": 2.0}
    with pytest.raises(UnsupportedModel, match="dynamic"):
        model.read()


@pytest.mark.parametrize(
    ("kind", "absent", "head_dim"), [("llama", 4, 16), ("mistral", 8, 16), ("qwen2", 32, None), ("qwen3", 32, 128)]
)
def test_what_a_config_leaves_out_is_what_transformers_assumes(
    model: Model, kind: str, absent: int, head_dim: int | None
) -> None:
    del model.config["num_key_value_heads"]
    model.config["model_type"] = kind
    read = model.read()
    arch = read["general.architecture"]
    assert read[f"{arch}.attention.head_count_kv"] == absent
    assert read.get(f"{arch}.attention.key_length") == head_dim


def test_general_facts_come_from_the_model_card(model: Model) -> None:
    model.write("README.md", "---\nlicense: apache-2.0\ntags:\n- home\n---\n# Card\n")
    model.write("generation_config.json", {"temperature": 0.6, "repetition_penalty": 1.1})
    read = model.read(shapes={"token_embd.weight": (134_515_008,)}, name="Butler")
    assert read["general.license"] == "apache-2.0"
    assert read["general.tags"] == ["home"]
    assert read["general.size_label"] == "135M"
    assert read["general.name"] == "Butler"
    assert read["general.sampling.temp"] == 0.6
    assert read["general.sampling.penalty_repeat"] == 1.1


def test_an_imported_model_is_named_after_its_file(model: Model) -> None:
    model.write("edgeft.json", {"imported_from": "Small-135M-Instruct.Q4_1.gguf", "licence": "Apache-2.0"})
    read = model.read()
    assert read["general.name"] == "Small 135M Instruct"
    assert read["general.basename"] == "Small"
    assert read["general.finetune"] == "Instruct"
    assert read["general.license"] == "apache-2.0"


def test_a_damaged_model_card_is_named(model: Model) -> None:
    model.write("README.md", "---\nlicense: [\n---\n")
    with pytest.raises(ModelError, match=r"front matter of .*README\.md"):
        model.read()


# --- SentencePiece ------------------------------------------------------------


def message(number: int, data: bytes) -> bytes:
    """A length-delimited field of a protocol buffer."""
    assert len(data) < 128
    return bytes([number << 3 | 2, len(data)]) + data


def piece(text: str, score: float, kind: int = 1) -> bytes:
    return message(1, message(1, text.encode()) + b"\x15" + struct.pack("<f", score) + bytes([3 << 3, kind]))


def spm(model_type: int = 2, dummy_prefix: int = 1) -> bytes:
    pieces = [piece("<unk>", 0, 2), piece("<s>", 0, 3), piece("</s>", 0, 3), piece("<0x0A>", 0, 6)]
    pieces += [piece("▁a", -1), piece("▁", -2), piece("a", -3)]
    return b"".join(pieces) + message(2, bytes([3 << 3, model_type])) + message(3, bytes([3 << 3, dummy_prefix]))


@pytest.fixture
def sentencepiece(model: Model) -> Model:
    (model.path / "tokenizer.json").unlink()
    (model.path / "tokenizer.model").write_bytes(spm())
    model.write("tokenizer_config.json", {"bos_token": "<s>", "eos_token": {"content": "</s>"}})
    return model


def test_a_sentencepiece_model_is_read_without_its_package(sentencepiece: Model) -> None:
    read = sentencepiece.read()
    assert read["tokenizer.ggml.model"] == "llama"
    assert read["tokenizer.ggml.pre"] == "default"
    assert read["tokenizer.ggml.tokens"][:7] == ["<unk>", "<s>", "</s>", "<0x0A>", "▁a", "▁", "a"]
    assert read["tokenizer.ggml.scores"][4:8] == [-1.0, -2.0, -3.0, -10000.0]
    assert read["tokenizer.ggml.token_type"][:8] == [2, 3, 3, 6, 1, 1, 1, 5]
    assert read["tokenizer.ggml.bos_token_id"] == 1
    assert read["tokenizer.ggml.eos_token_id"] == 2
    assert read["tokenizer.ggml.add_bos_token"] is True
    assert "tokenizer.ggml.add_space_prefix" not in read


def test_added_tokens_join_a_sentencepiece_model(sentencepiece: Model) -> None:
    sentencepiece.write("added_tokens.json", {"▁<fn>": 7})
    read = sentencepiece.read()
    assert read["tokenizer.ggml.tokens"][7] == " <fn>"
    assert read["tokenizer.ggml.token_type"][7] == TokenType.USER_DEFINED
    assert read["tokenizer.ggml.scores"][7] == -1000.0


def test_a_model_without_dummy_prefix_says_so(sentencepiece: Model) -> None:
    (sentencepiece.path / "tokenizer.model").write_bytes(spm(dummy_prefix=0))
    assert sentencepiece.read()["tokenizer.ggml.add_space_prefix"] is False


@pytest.mark.parametrize("damage", [b"", b"\xff", spm()[:-3], piece("<unk>", 0)[:6], b"not a model at all"])
def test_a_damaged_sentencepiece_model_names_the_file(sentencepiece: Model, damage: bytes) -> None:
    (sentencepiece.path / "tokenizer.model").write_bytes(damage)
    with pytest.raises(ModelError, match=r"tokenizer\.model is not a SentencePiece model"):
        sentencepiece.read()


def test_a_unigram_sentencepiece_model_is_refused(sentencepiece: Model) -> None:
    (sentencepiece.path / "tokenizer.model").write_bytes(spm(model_type=1))
    with pytest.raises(UnsupportedModel, match="unigram"):
        sentencepiece.read()


def test_scores_follow_from_the_order_of_merges_when_only_tokenizer_json_is_left(model: Model) -> None:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x0A>": 3, "▁a": 4, "▁ab": 5, "▁": 6, "a": 7, "b": 8}
    model.tokenizer(
        added_tokens=[added(0, "<unk>"), added(1, "<s>"), added(2, "</s>")],
        normalizer={"type": "Prepend", "prepend": "▁"},
        pre_tokenizer=None,
        model={
            "type": "BPE",
            "byte_fallback": True,
            "unk_token": "<unk>",
            "vocab": vocab,
            "merges": ["▁ a", "▁a b", "▁ ab"],
        },
    )
    model.write("tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    read = model.read()
    assert read["tokenizer.ggml.model"] == "llama"
    assert read["tokenizer.ggml.scores"][:9] == [-1000.0, -1000.0, -1000.0, 0.0, -0.0, -1.0, -2.0, -2.0, -2.0]
    assert read["tokenizer.ggml.token_type"][:9] == [3, 3, 3, 6, 1, 1, 1, 1, 1]


# --- The real thing -----------------------------------------------------------


@pytest.mark.model
def test_smollm2_says_what_its_own_gguf_said(smollm2_gguf: Path, smollm2_hf: Path) -> None:
    """Imported into a Hugging Face directory and back, everything about the vocabulary is as it was."""
    was = reference.read_gguf(smollm2_gguf).metadata
    config = json.loads((smollm2_hf / "config.json").read_text())
    now = {pair.key: pair.value for pair in metadata(smollm2_hf, config)}
    for key in ("model", "pre", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id", "add_bos_token"):
        assert now[f"tokenizer.ggml.{key}"] == was[f"tokenizer.ggml.{key}"][1], key
    assert now["tokenizer.chat_template"] == was["tokenizer.chat_template"][1]
