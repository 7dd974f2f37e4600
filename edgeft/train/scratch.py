"""A base with random weights: the architecture of another model, in its shape or a smaller one, with its tokenizer.

A shape is a JSON file with settings of config.json that are to be others: `{"hidden_size": 256,
"num_hidden_layers": 6, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size":
4096}`. With fewer words than the original has, the tokenizer keeps the first ones (and the merges that only need
those): byte-pair vocabularies are learned in order of use, so the first are the most frequent, and all bytes and
special tokens are among them.

The folder lies in the store beside imported models, named by all that decides its content.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from edgeft.errors import ModelError, UsageError, require
from edgeft.models import ResolvedModel
from edgeft.models.quiet import quiet_libraries
from edgeft.models.store import SIDECAR, atomic_directory, imports_dir, locked, sweep
from edgeft.paths import parse_json, sha256_file, write_json, write_text
from edgeft.train.config import TrainConfig

_RECIPE = 1
"""Part of the folder's name: raised when the same settings give other weights."""

SETTINGS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "rope_theta", "tie_word_embeddings", "initializer_range",
)  # fmt: skip
"""What a shape may say."""


def random_base(config: TrainConfig, original: ResolvedModel) -> ResolvedModel:
    """The folder with random weights, made on first use.

    Raises:
        UsageError: the shape cannot be read or does not go with the tokenizer.
        ModelError, WriteError
    """
    shape = read_shape_file(Path(config.from_scratch)) if config.from_scratch != "base" else {}
    parts = [_RECIPE, config.seed, sorted(shape.items())]
    parts += [sha256_file(original.path / name) for name in ("config.json", "tokenizer.json")]
    folder = imports_dir() / f"scratch-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"
    with locked(folder.name):
        if not (folder / "config.json").is_file():
            sweep(imports_dir(), f".{folder.name}.*.tmp")
            with atomic_directory(folder) as made, quiet_libraries():
                _make(original.path, made, shape, config.seed)
                origin = f"random, seed {config.seed}"
                write_json(made / SIDECAR, {"origin": origin, "shape": shape, "licence": original.licence})
    return ResolvedModel("hf", folder, original.reference, original.licence)


def read_shape_file(file: Path) -> dict[str, Any]:
    """Raises: UsageError."""
    try:
        shape = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the shape {file} cannot be read: {error}", "It is a JSON object; docs/ternary.md."
        ) from error
    if not isinstance(shape, dict) or not shape.keys() <= set(SETTINGS):
        raise UsageError(f"{file} is no shape", f"A JSON object with some of: {', '.join(SETTINGS)}.")
    wrong = [name for name, value in shape.items() if not isinstance(value, int | float) or value < 0]
    if wrong:
        raise UsageError(f"{file}: {wrong[0]} is {shape[wrong[0]]!r}, not a number above 0")
    return shape


def _make(original: Path, folder: Path, shape: dict[str, Any], seed: int) -> None:
    transformers, torch = require("transformers", "train"), require("torch", "train")
    config = transformers.AutoConfig.from_pretrained(original, local_files_only=True, trust_remote_code=False)
    words = int(shape.get("vocab_size", config.vocab_size))
    if words > config.vocab_size:
        raise UsageError(f"the tokenizer has {config.vocab_size} tokens, not {words}", "Leave out vocab_size.")
    for name, value in _whole(shape).items():
        setattr(config, name, value)
    if config.num_attention_heads % config.num_key_value_heads:
        raise UsageError(f"{config.num_attention_heads} heads cannot share {config.num_key_value_heads} pairs of keys")
    transformers.set_seed(seed)
    try:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except Exception as error:  # transformers raises anything on settings that do not fit together
        raise UsageError(
            f"no model has the shape {shape}: {error}", "Look at head_dim and the numbers of heads."
        ) from error
    model.save_pretrained(folder)
    for file in original.iterdir():
        if file.is_file() and not (folder / file.name).exists() and file.suffix != ".safetensors":
            shutil.copyfile(file, folder / file.name)
    if words < len(_vocabulary(folder)):
        _cut_tokenizer(folder / "tokenizer.json", words)


def _whole(shape: dict[str, Any]) -> dict[str, Any]:
    """With the width of a head that follows from the others, which is written out in many configurations."""
    if "head_dim" in shape or not {"hidden_size", "num_attention_heads"} <= shape.keys():
        return shape
    return {**shape, "head_dim": shape["hidden_size"] // shape["num_attention_heads"]}


def _vocabulary(folder: Path) -> dict[str, int]:
    vocabulary: dict[str, int] = _document(folder / "tokenizer.json")["model"]["vocab"]
    return vocabulary


def _document(file: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = parse_json(file.read_text(encoding="utf-8"))
        if document["model"]["type"] == "BPE":
            return document
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file} cannot be read: {error!r}") from error
    raise UsageError(f"{file} is no byte-pair tokenizer, which could be cut", "Leave out vocab_size.")


def _cut_tokenizer(file: Path, words: int) -> None:
    """Keep the first tokens. Raises: UsageError when a special token or a byte is not among them."""
    document = _document(file)
    model = document["model"]
    lost = [token["content"] for token in document["added_tokens"] if token["id"] >= words]
    single = [token for token, id_ in model["vocab"].items() if len(token) == 1 and id_ >= words]
    if lost or single:
        raise UsageError(f"among the first {words} tokens there is no {(lost + single)[0]!r}", "Raise vocab_size.")
    model["vocab"] = {token: id_ for token, id_ in model["vocab"].items() if id_ < words}
    model["merges"] = [pair for pair in model["merges"] if _possible(pair, model["vocab"])]
    write_text(file, json.dumps(document, ensure_ascii=False))


def _possible(merge: Any, vocabulary: dict[str, int]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in vocabulary and right in vocabulary and left + right in vocabulary
