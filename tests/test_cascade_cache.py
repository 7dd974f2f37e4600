"""Answers reused for nearly the same question: only there, only for a while, and nobody's personal data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty_cloud import FaultyCloud, faulty_cloud
from safetensors.numpy import save_file
from test_cascade import opened
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from edgeft.cascade import Cascade, Record
from edgeft.cascade.cache import AnswerCache, Asked
from edgeft.cascade.embedder import Embedder
from edgeft.cascade.settings import CacheSettings
from edgeft.chat import Sampling
from edgeft.errors import ConfigError

WORDS = {
    "capital": (1, 0, 0, 0),
    "city": (0.9, 0.1, 0, 0),
    "france": (0, 1, 0, 0),
    "spain": (0, 0, 1, 0),
    "weather": (0, 0, 0, 1),
    **dict.fromkeys(("what", "is", "the", "of", "main", "in", "please", "mail", "2019", "2020"), (0.01, 0.01, 0, 0)),
}


def static_model(folder: Path, vectors: Mapping[str, Sequence[float]]) -> Path:
    """A static embedding model with a vector for each word, and none for other words."""
    folder.mkdir()
    words = ["[UNK]", *vectors]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    known = np.array(list(vectors.values()), np.float32)
    save_file({"embeddings": np.vstack([np.zeros_like(known[:1]), known])}, folder / "model.safetensors")
    return folder


@pytest.fixture
def embedder(tmp_path: Path) -> Path:
    return static_model(tmp_path / "static", WORDS)


CACHE = '[cache]\nexpire-s = 60\nnear = 0.97\nembedder = "static"\n'


def ask(cascade: Cascade, question: str, *before: dict[str, Any], **sampling: Any) -> tuple[str, Record]:
    messages = [*before, {"role": "user", "content": question}]
    deltas = list(cascade.answer(messages, Sampling(**{"max_tokens": 40, **sampling})))
    record = deltas[-1].record
    assert record is not None
    return "".join(delta.text for delta in deltas), record


def numbered(cloud: FaultyCloud) -> None:
    """Every answer of the cloud is another one."""
    cloud.answer = lambda asked: [f"answer {len(cloud.wire)}"]


def test_a_question_that_is_nearly_the_same_has_the_same_answer(tmp_path: Path, embedder: Path) -> None:
    with faulty_cloud("good") as cloud, opened(tmp_path, cloud.url, more=CACHE) as cascade:
        numbered(cloud)
        first, _ = ask(cascade, "What is the capital of France?")
        again, record = ask(cascade, "what is the main city of france please")
        audited = cascade.audit.records()[0]
        other, _ = ask(cascade, "What is the capital of Spain?")
        third, _ = ask(cascade, "weather")
    assert again == first == "answer 1" and record.cached and record.cost == 0 and record.authors == ["big"]
    assert "near this one (0.9" in audited["reason"]
    assert (other, third) == ("answer 2", "answer 3") and len(cloud.wire) == 3


@pytest.mark.parametrize(
    ("before", "how"),
    [
        ([{"role": "system", "content": "Answer like a pirate."}], {}),
        ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}], {}),
        ([], {"max_tokens": 39}),
        ([], {"seed": 1, "temperature": 1.0}),
    ],
)
def test_nothing_is_reused_where_anything_else_differs(
    tmp_path: Path, embedder: Path, before: list[Any], how: dict[str, Any]
) -> None:
    with faulty_cloud("good") as cloud, opened(tmp_path, cloud.url, more=CACHE) as cascade:
        numbered(cloud)
        ask(cascade, "capital of france")
        assert ask(cascade, "capital of france", *before, **how)[0] == "answer 2"
        assert ask(cascade, "the capital of france", *before, **how)[0] == "answer 2"  # its own is near
        assert ask(cascade, "the capital of france")[0] == "answer 1"


def test_other_numbers_are_another_question(tmp_path: Path, embedder: Path) -> None:
    with faulty_cloud("good") as cloud, opened(tmp_path, cloud.url, more=CACHE) as cascade:
        numbered(cloud)
        said = [ask(cascade, f"capital of france {year}")[0] for year in ("2019", "2020", "in 2019")]
    assert said == ["answer 1", "answer 2", "answer 1"]


def test_an_answer_with_personal_data_is_nobody_elses(tmp_path: Path, embedder: Path) -> None:
    with faulty_cloud("good") as cloud, opened(tmp_path, cloud.url, more=CACHE) as cascade:
        cloud.answer = lambda asked: [asked["messages"][-1]["content"]]
        first = ask(cascade, "mail capital france ann@example.org")[0]
        assert "ann@example.org" in first
        assert "ann@" not in ask(cascade, "mail capital france bob@example.org")[0]
        assert "ann@" not in ask(cascade, "mail capital france")[0]
        assert ask(cascade, "mail capital france ann@example.org")[0] == first and len(cloud.wire) == 3


def test_near_answers_expire_too(embedder: Path) -> None:
    now = [0.0]
    settings = CacheSettings(expire_s=10, near=0.9, embedder="x")
    cache = AnswerCache(settings, lambda: now[0], Embedder(embedder).vector)
    cache.put(Asked("1", "s", "capital france"), "big", "Paris")
    near = Asked("2", "s", "city france")
    found = cache.get(near)
    assert found and found.text == "Paris" and 0.9 < found.similarity < 1
    assert cache.get(Asked("2", "another system prompt", "city france")) is None
    now[0] = 10
    assert cache.get(near) is None and not cache._entries


def test_a_text_without_known_words_is_near_nothing(embedder: Path) -> None:
    assert Embedder(embedder).vector("") is None and Embedder(embedder).vector("xyzzy") is None


def test_what_is_no_embedder_is_said(tmp_path: Path, embedder: Path) -> None:
    (embedder / "model.safetensors").write_bytes(b"nothing")
    with (
        pytest.raises(ConfigError, match="no static embedding model"),
        opened(tmp_path, "http://127.0.0.1:1", more=CACHE),
    ):
        pass
    with (
        pytest.raises(ConfigError, match=r"needs cache\.embedder"),
        opened(tmp_path, "http://127.0.0.1:1", more="[cache]\nnear = 0.9\n"),
    ):
        pass
    save_file({"embeddings": np.zeros((2, 4), np.float32)}, embedder / "model.safetensors")
    with pytest.raises(ConfigError, match="do not belong"):
        Embedder(embedder)
    assert json.loads((embedder / "tokenizer.json").read_text())["model"]["type"] == "WordLevel"
