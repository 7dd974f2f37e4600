"""Everything a GGUF says about a model besides its weights: names, shapes, rope, tokenizer, chat template.

Keys and their meaning: ggml's `docs/gguf.md`. Where llama.cpp's converter and this module differ, and why, is in
`docs/gguf-metadata.md`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import yaml  # type: ignore[import-untyped]

from edgeft.errors import ModelError, UnsupportedModel

from .gguf_pretokenizers import recognise
from .gguf_special import SpecialTokens, read_special_tokens, stop_token_ids, without_false_control
from .gguf_vocab import TokenizerFiles, Vocabulary, read_files, read_json, read_vocabulary
from .gguf_writer import KeyValue, ValueType, array, boolean, float32, string, uint32

__all__ = ["metadata", "stop_token_ids"]

SIDECAR = "edgeft.json"

ARCHITECTURES: Mapping[str, str] = {
    # config.json's model_type -> general.architecture
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}

_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
"""num_key_value_heads when config.json leaves it out (transformers' configuration classes); else as many as heads."""

Warn = Callable[[str], None]


def _silent(text: str) -> None:
    pass


def metadata(
    model_dir: Path,
    config: Mapping[str, Any],
    *,
    tokenizer_dir: Path | None = None,
    rows: int | None = None,
    parameters: int = 0,
    chat_template: str | None = None,
    name: str | None = None,
    tokenizer_pre: str | None = None,
    warn: Warn = _silent,
) -> list[KeyValue]:
    """All metadata of a model except `general.file_type` and `general.quantization_version`.

    Args:
        model_dir: the Hugging Face directory.
        config: its config.json.
        tokenizer_dir: where the tokenizer files are, when not in `model_dir` (an adapter that added tokens).
        rows: rows of the embedding that is written; config.json's vocab_size when None.
        parameters: number of weights written; gives `general.size_label`.
        chat_template: overrides the folder's own.
        name: overrides `general.name`.
        tokenizer_pre: overrides `tokenizer.ggml.pre`.
        warn: told about what llama.cpp cannot express.

    Raises:
        UnsupportedModel: architecture or tokenizer that edgeft cannot express.
        ModelError: missing or contradictory files.
    """
    return [
        *_general(model_dir, config, parameters, name),
        *_architecture(config, rows, model_dir),
        *_tokenizer(
            read_files(tokenizer_dir or model_dir), config, rows, chat_template, tokenizer_pre, model_dir, warn
        ),
    ]


# --- general.* ----------------------------------------------------------------


def _general(model_dir: Path, config: Mapping[str, Any], parameters: int, name: str | None) -> Iterator[KeyValue]:
    """Names, licence, base models and suggested sampling, from the model card and the folder's name."""
    found = _card(model_dir, parameters)
    sidecar = read_json(model_dir / SIDECAR)
    if isinstance(source := sidecar.get("imported_from"), str):
        _name_after(found, source, parameters)
    found.license = found.license or (sidecar.get("licence") or "").lower() or None
    found.name = name or found.name or model_dir.name
    penalty = read_json(model_dir / "generation_config.json").get("repetition_penalty")
    if found.sampling_penalty_repeat is None and penalty is not None:
        found.sampling_penalty_repeat = penalty
    if found.size_label is None and parameters > 0:
        found.size_label = gguf.size_label(parameters, parameters, 0, 0)
    writer = gguf.GGUFWriter(path=None, arch=architecture(config, model_dir))
    writer.add_type(gguf.GGUFType.MODEL)
    found.set_gguf_meta_model(writer)
    for key, value in writer.kv_data[0].items():
        yield _key_value(key, value)


def _card(model_dir: Path, parameters: int) -> Any:
    """What the gguf package makes of README.md, config.json and the folder's name."""
    try:
        return gguf.Metadata.load(None, model_dir, None, parameters)
    except (yaml.YAMLError, ValueError) as error:
        raise ModelError(
            f"the front matter of {model_dir / 'README.md'} cannot be read: {error}", "Repair it, or remove the file."
        ) from error


def _name_after(found: Any, file: str, parameters: int) -> None:
    """Name an imported model after the GGUF it came from: its folder's name is edgeft's, with a digest in it."""
    stem = re.sub(r"[.-](i?q\d\w*|b?f(16|32))$", "", Path(file).stem, flags=re.IGNORECASE)
    full, _, found.basename, found.finetune, found.version, size = gguf.Metadata.get_model_id_components(
        stem, parameters
    )
    found.name = gguf.Metadata.id_to_title(full)
    found.size_label = size


def _key_value(key: str, value: Any) -> KeyValue:
    """A pair as the gguf package holds it."""
    kind = ValueType(value.type)
    if kind is not ValueType.ARRAY:
        return KeyValue(key, kind, value.value)
    # Tags and languages; YAML may have read one as a number.
    return array(key, ValueType.STRING, [str(item) for item in value.value])


# --- <architecture>.* ---------------------------------------------------------


def architecture(config: Mapping[str, Any], model_dir: Path) -> str:
    """`general.architecture`. Raises: UnsupportedModel."""
    kind = str(config.get("model_type", "nameless"))
    if kind not in ARCHITECTURES:
        raise UnsupportedModel(f"{model_dir} is a {kind} model; edgeft exports {', '.join(ARCHITECTURES)} to GGUF")
    return ARCHITECTURES[kind]


def _required(config: Mapping[str, Any], key: str, model_dir: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int):
        raise ModelError(f"{model_dir / 'config.json'} has no {key}", "Fetch the model again.")
    return value


def _architecture(config: Mapping[str, Any], rows: int | None, model_dir: Path) -> Iterator[KeyValue]:
    arch, kind = architecture(config, model_dir), config["model_type"]
    hidden, heads = (_required(config, key, model_dir) for key in ("hidden_size", "num_attention_heads"))
    yield uint32(f"{arch}.block_count", _required(config, "num_hidden_layers", model_dir))
    yield uint32(f"{arch}.context_length", _required(config, "max_position_embeddings", model_dir))
    yield uint32(f"{arch}.embedding_length", hidden)
    yield uint32(f"{arch}.feed_forward_length", _required(config, "intermediate_size", model_dir))
    yield uint32(f"{arch}.attention.head_count", heads)
    kv_heads = config.get("num_key_value_heads", _KV_HEADS.get(kind, heads))
    yield uint32(f"{arch}.attention.head_count_kv", kv_heads or heads)
    yield from _rope(config, arch)
    yield float32(f"{arch}.attention.layer_norm_rms_epsilon", config.get("rms_norm_eps", 1e-6))
    head_dim = config.get("head_dim") or {"qwen2": None, "qwen3": 128}.get(kind, hidden // heads)
    if head_dim is not None:
        yield uint32(f"{arch}.attention.key_length", head_dim)
        yield uint32(f"{arch}.attention.value_length", head_dim)
    if arch == "llama":
        yield uint32("llama.vocab_size", rows or _required(config, "vocab_size", model_dir))
        yield uint32("llama.rope.dimension_count", head_dim or hidden // heads)


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rope settings in one form, whichever generation of transformers wrote the config.

    `rope_type` is always there ("default" when nothing is scaled), and so is `rope_theta`.
    """
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    return rope


def _rope(config: Mapping[str, Any], arch: str) -> Iterator[KeyValue]:
    rope = rope_parameters(config)
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        yield string(f"{arch}.rope.scaling.type", kind)
        yield float32(f"{arch}.rope.scaling.factor", rope["factor"])
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        yield uint32(f"{arch}.rope.scaling.original_context_length", original)
        for ours, keys in _YARN.items():
            value = next((rope[key] for key in keys if rope.get(key) is not None), None)
            if value is not None:
                yield float32(f"{arch}.rope.scaling.{ours}", value)
    elif kind not in ("default", "linear", "llama3"):
        # llama3's factors are a tensor, rope_freqs.
        raise UnsupportedModel(f"rope scaling of type {kind!r} cannot be expressed in a GGUF of this architecture")
    yield float32(f"{arch}.rope.freq_base", rope["rope_theta"])


_YARN = {
    "yarn_ext_factor": ("extrapolation_factor",),
    "yarn_attn_factor": ("attention_factor", "attn_factor"),
    "yarn_beta_fast": ("beta_fast",),
    "yarn_beta_slow": ("beta_slow",),
}


# --- tokenizer.* --------------------------------------------------------------


def _tokenizer(
    files: TokenizerFiles,
    config: Mapping[str, Any],
    rows: int | None,
    chat_template: str | None,
    tokenizer_pre: str | None,
    model_dir: Path,
    warn: Warn,
) -> Iterator[KeyValue]:
    vocabulary = read_vocabulary(files, rows or _required(config, "vocab_size", model_dir))
    special = read_special_tokens(files, config, vocabulary.tokens)
    vocabulary = without_false_control(vocabulary, special)
    yield string("tokenizer.ggml.model", vocabulary.model)
    yield string("tokenizer.ggml.pre", tokenizer_pre or _pre(files, vocabulary, model_dir))
    yield array("tokenizer.ggml.tokens", ValueType.STRING, vocabulary.tokens)
    if vocabulary.scores:
        yield array("tokenizer.ggml.scores", ValueType.FLOAT32, vocabulary.scores)
    yield array("tokenizer.ggml.token_type", ValueType.INT32, [int(kind) for kind in vocabulary.types])
    if vocabulary.merges:
        yield array("tokenizer.ggml.merges", ValueType.STRING, vocabulary.merges)
    yield from _special(special, vocabulary, files)
    if special.unmarked:
        texts = ", ".join(vocabulary.tokens[id_] for id_ in special.unmarked)
        warn(f"a GGUF has no place for the stop tokens {texts}; only edgeft will stop there")
    yield from _templates(files, chat_template, warn)


def _pre(files: TokenizerFiles, vocabulary: Vocabulary, model_dir: Path) -> str:
    if vocabulary.model == "llama":
        return "default"
    # The GGUF a folder was imported from knew it, and its tokenizer.json may have lost it.
    said = read_json(model_dir / SIDECAR).get("tokenizer_pre")
    return said if isinstance(said, str) else recognise(files.tokenizer, str(files.folder / "tokenizer.json"))


def _special(special: SpecialTokens, vocabulary: Vocabulary, files: TokenizerFiles) -> Iterator[KeyValue]:
    keys = {"unk": "unknown", "sep": "seperator", "pad": "padding"}  # GGUF's own spelling
    for role, id_ in special.ids.items():
        yield uint32(f"tokenizer.ggml.{keys.get(role, role)}_token_id", id_)
    for role, added in special.add.items():
        yield boolean(f"tokenizer.ggml.add_{role}_token", added)
    if vocabulary.add_space_prefix is not None:
        yield boolean("tokenizer.ggml.add_space_prefix", vocabulary.add_space_prefix)


def _templates(files: TokenizerFiles, override: str | None, warn: Warn) -> Iterator[KeyValue]:
    templates = _named_templates(files)
    if override is not None:
        templates = {**templates, "default": override}
    if "default" not in templates:
        warn(f"{files.folder} has no chat template; the file will complete text, but not chat")
    others = [re.sub("[^A-Za-z0-9]", "_", name) for name in templates if name != "default"]
    for key, template in zip(others, (text for name, text in templates.items() if name != "default"), strict=True):
        yield string(f"tokenizer.chat_template.{key}", template)
    if others:
        yield array("tokenizer.chat_templates", ValueType.STRING, others)
    if "default" in templates:
        yield string("tokenizer.chat_template", templates["default"])


def _named_templates(files: TokenizerFiles) -> dict[str, str]:
    """Templates by name: the .jinja file is what tokenizers save now, the JSON field may be older."""
    jinja = files.folder / "chat_template.jinja"
    more = sorted((files.folder / "additional_chat_templates").glob("*.jinja"))
    if jinja.is_file():
        return {
            "default": jinja.read_text(encoding="utf-8"),
            **{file.stem: file.read_text(encoding="utf-8") for file in more},
        }
    said: str | Sequence[Mapping[str, str]] | None = files.config.get("chat_template")
    if said is None:
        said = read_json(files.folder / "chat_template.json").get("chat_template")
    if isinstance(said, str):
        return {"default": said}
    return {choice["name"]: choice["template"] for choice in said or ()}
