"""Everything a GGUF says about a model besides its weights: names, shapes, rope, tokenizer, chat template.

Keys and their meaning: ggml's `docs/gguf.md`. Where llama.cpp's converter and this module differ, and why, is in
`docs/gguf-metadata.md`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import yaml  # type: ignore[import-untyped]

from edgeft.errors import ModelError, UnsupportedModel
from edgeft.models.text import read_template

from .families import family_of
from .families.family import COMMON_KEYS, Family
from .gguf_architectures import settings
from .gguf_pretokenizers import recognise
from .gguf_special import SpecialTokens, read_special_tokens, stop_token_ids, without_false_control
from .gguf_vocab import TokenizerFiles, Vocabulary, read_files, read_json, read_vocabulary
from .gguf_writer import KeyValue, ValueType, array, boolean, float32, string, uint32
from .rope import rope_parameters

__all__ = ["metadata", "stop_token_ids"]

SIDECAR = "edgeft.json"

Warn = Callable[[str], None]


def _silent(text: str) -> None:
    pass


def metadata(
    model_dir: Path,
    config: Mapping[str, Any],
    *,
    tokenizer_dir: Path | None = None,
    rows: int | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
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
        shapes: GGUF name -> shape of every tensor written; gives `general.size_label`.
        chat_template: overrides the folder's own.
        name: overrides `general.name`.
        tokenizer_pre: overrides `tokenizer.ggml.pre`.
        warn: told about what llama.cpp cannot express.

    Raises:
        UnsupportedModel: architecture or tokenizer that edgeft cannot express.
        ModelError: missing or contradictory files.
    """
    family = family_of(config)
    config = settings(config, family)
    return [
        *_general(model_dir, family.name, shapes or {}, name),
        *_architecture(config, family, rows, model_dir),
        *_tokenizer(
            read_files(tokenizer_dir or model_dir), config, rows, chat_template, tokenizer_pre, model_dir, warn
        ),
    ]


# --- general.* ----------------------------------------------------------------


def _general(
    model_dir: Path, architecture: str, shapes: Mapping[str, tuple[int, ...]], name: str | None
) -> Iterator[KeyValue]:
    """Names, licence, base models and suggested sampling, from the model card and the folder's name."""
    parameters = sum(math.prod(shape) for shape in shapes.values())
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
        found.size_label = _size_label(shapes, parameters)
    writer = gguf.GGUFWriter(path=None, arch=architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    found.set_gguf_meta_model(writer)
    for key, value in writer.kv_data[0].items():
        yield _key_value(key, value)


def _size_label(shapes: Mapping[str, tuple[int, ...]], parameters: int) -> str:
    """ "135M"; with experts their number, and the weights of one and of what they share: "128x1.8B"."""
    experts = [shape for name, shape in shapes.items() if "_exps." in name]
    count = experts[0][0] if experts else 0
    all_ = sum(math.prod(shape) for shape in experts)
    return str(gguf.size_label(parameters, parameters - all_, all_ // count if count else 0, count))


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


def _required(config: Mapping[str, Any], key: str, model_dir: Path) -> Any:
    if config.get(key) is None:
        raise ModelError(f"{model_dir / 'config.json'} has no {key}", "Fetch the model again.")
    return config[key]


def _architecture(config: Mapping[str, Any], family: Family, rows: int | None, model_dir: Path) -> Iterator[KeyValue]:
    config = {**config, "vocab_size": rows or _required(config, "vocab_size", model_dir)}
    for key in (*COMMON_KEYS, *family.keys):
        value = _required(config, key.value, model_dir) if isinstance(key.value, str) else key.value(config)
        if value is not None:
            yield key.make(f"{family.name}.{key.name}", value)
    yield from _rope(config, family)


def _rope(config: Mapping[str, Any], family: Family) -> Iterator[KeyValue]:
    rope, prefix = rope_parameters(config), f"{family.name}.rope"
    kind = rope["rope_type"]
    if kind not in family.rope:
        raise UnsupportedModel(
            f"rope scaling of type {kind!r} cannot be expressed in a GGUF of the {family.name} family"
        )
    if kind in ("linear", "yarn"):
        yield string(f"{prefix}.scaling.type", kind)
        yield float32(f"{prefix}.scaling.factor", rope["factor"])
    if kind == "yarn":
        yield uint32(f"{prefix}.scaling.original_context_length", rope["original_max_position_embeddings"])
        for ours, keys in _YARN.items():
            value = next((rope[key] for key in keys if rope.get(key) is not None), None)
            if value is not None:
                yield float32(f"{prefix}.scaling.{ours}", value)
    yield float32(f"{prefix}.freq_base", rope["rope_theta"])


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
            "default": read_template(jinja),
            **{file.stem: read_template(file) for file in more},
        }
    said: str | Sequence[Mapping[str, str]] | None = files.config.get("chat_template")
    if said is None:
        said = read_json(files.folder / "chat_template.json").get("chat_template")
    if isinstance(said, str):
        return {"default": said}
    return {choice["name"]: choice["template"] for choice in said or ()}
