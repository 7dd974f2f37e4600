"""What holds for ONNX folders in both runtimes: templates, tokens, sampling, cancelling, the cache, bad folders."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

pytest.importorskip("onnxruntime_genai")

from edgeft.runtimes.hf_text import HfText
from edgeft.runtimes.sampler import Sampler, log_softmax

from edgeft import plugins
from edgeft.artifact import Artifact
from edgeft.chat import Cancel, Sampling, Usage
from edgeft.cli.main import main
from edgeft.errors import ModelError, UsageError
from edgeft.plugins import AdapterScale, LoadOptions, Session

ASK = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    base = tiny.write_model(folder / "base", seed=3)
    out = folder / "m-onnx"
    assert main(["export", str(base), "--to", "onnx-fp32", "--out", str(out), "--no-verify"]) == 0
    return out


@pytest.fixture(params=["onnxruntime-genai", "onnxruntime"])
def runtime(request: pytest.FixtureRequest) -> Any:
    return plugins.load("runtimes", request.param)


@pytest.fixture
def load(runtime: Any) -> Iterator[Any]:
    opened: list[Session] = []

    def load_(path: Path, **options: Any) -> Session:
        opened.append(runtime.load(Artifact(path), LoadOptions(**{"threads": 1, **options})))
        return opened[-1]

    yield load_
    for session in opened:
        session.close()


def changed(model: Path, folder: Path, **files: str | None) -> Path:
    """A copy with other files; `a__b` is a.b, None removes it."""
    shutil.copytree(model, folder)
    for name, content in files.items():
        file = folder / name.replace("__", ".")
        file.unlink() if content is None else file.write_text(content)
    return folder


def tokens(session: Session, prompt: list[int], **sampling: Any) -> tuple[list[int], Usage]:
    deltas = list(session.generate(prompt, Sampling(**sampling)))
    assert deltas[-1].usage is not None
    return [delta.token for delta in deltas if delta.token is not None], deltas[-1].usage


# --- Template and tokens ----------------------------------------------------------------


def test_the_folders_own_template_is_rendered_as_in_training(load: Any, model: Path) -> None:
    side = HfText(model)
    expected = side.tokenize("<|im_start|>user\nhi<|im_end|>\n", special=True)
    assert load(model).render(ASK) == expected and {257, 258} < set(expected)


def test_without_a_template_there_is_no_guess(load: Any, model: Path, tmp_path: Path) -> None:
    session = load(changed(model, tmp_path / "x", chat_template__jinja=None))
    with pytest.raises(ModelError, match="no chat template, and edgeft does not guess one"):
        session.render(ASK)


def test_a_template_runs_in_a_sandbox(load: Any, model: Path, tmp_path: Path) -> None:
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ModelError, match="chat template"):
        load(changed(model, tmp_path / "x", chat_template__jinja=template)).render(ASK)


def test_control_tokens_in_plain_text_are_text_unless_asked_for(load: Any, model: Path) -> None:
    session = load(model)
    assert session.tokenize("<|im_end|>", special=True) == [258]
    plain = session.tokenize("<|im_end|>")
    assert 258 not in plain and session.detokenize(plain) == "<|im_end|>"
    assert session.detokenize([258]) == ""


@pytest.mark.parametrize("text", ["héllo 👍\n", "  two  spaces", "tab\tand ▁ <0x41>", ""])
def test_text_comes_back(load: Any, model: Path, text: str) -> None:
    session = load(model)
    assert session.detokenize(session.tokenize(text)) == text


def test_a_sentencepiece_vocabulary_comes_back_too(tmp_path: Path) -> None:
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b"]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [tiny._added(at, text) for at, text in enumerate(vocabulary[:3])],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {text: at for at, text in enumerate(vocabulary)},
            "merges": [],
        },
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    text = HfText(tmp_path)
    for sample in ("a b", " é👍", "ab\n"):
        assert text.detokenize(text.tokenize(sample)) == sample
    assert text.tokenize("a", bos=True) == [1, 260]
    assert text.tokenize("<s>a", special=True, bos=True) == [1, 260]
    assert text.ends == {2}


def test_text_that_is_no_unicode_is_refused(load: Any, model: Path) -> None:
    with pytest.raises(UsageError, match="not valid Unicode"):
        load(model).tokenize("\ud83d")


# --- Generation -------------------------------------------------------------------------


def test_every_end_token_ends_the_answer(load: Any, model: Path, tmp_path: Path) -> None:
    session = load(model)
    said, usage = tokens(session, [10, 11, 12], max_tokens=4)
    assert usage.finish_reason == "length" and usage.completion_tokens == 4
    end = session._text._tokenizer.id_to_token(said[0])
    settings = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end})
    again, usage = tokens(load(changed(model, tmp_path / "x", tokenizer_config__json=settings)), [10, 11, 12])
    assert again == [] and usage.finish_reason == "stop"


def test_a_stop_string_ends_the_answer_and_is_not_shown(load: Any, model: Path) -> None:
    session = load(model)
    whole = "".join(d.text for d in session.generate([10, 11, 12], Sampling(max_tokens=30)))
    stop = whole[4:6]
    deltas = list(session.generate([10, 11, 12], Sampling(max_tokens=30, stop=(stop,))))
    assert "".join(delta.text for delta in deltas) == whole[: whole.index(stop)]
    assert deltas[-1].usage is not None and deltas[-1].usage.finish_reason == "stop"


def test_the_same_seed_says_the_same(load: Any, model: Path) -> None:
    session = load(model)
    how = {"max_tokens": 12, "temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    first, again, other = (tokens(session, [10, 11], seed=seed, **how)[0] for seed in (1, 1, 2))
    assert first == again != other


def test_log_probabilities_are_those_of_score(load: Any, model: Path) -> None:
    session = load(model)
    deltas = [d for d in session.generate([10, 11, 12], Sampling(max_tokens=5, top_logprobs=3)) if d.token is not None]
    said = [delta.token for delta in deltas]
    rows = session.score([10, 11, 12, *said], 2)
    for row, delta in zip(rows, deltas, strict=False):
        assert delta.logprob == pytest.approx(row[delta.token], abs=1e-3)
        assert delta.top_logprobs[0] == (delta.token, delta.logprob) and len(delta.top_logprobs) == 3


def test_scores_are_the_same_however_they_are_cut(load: Any, model: Path) -> None:
    prompt = [int(token) for token in np.random.default_rng(0).integers(0, 256, 200)]
    whole = load(model).score(prompt)
    assert whole.shape == (200, 260)
    np.testing.assert_allclose(np.exp(whole).sum(axis=1), 1, atol=1e-4)
    np.testing.assert_allclose(load(model, batch=7).score(prompt, 50), whole[50:], atol=1e-3)


def test_the_common_beginning_is_reused(load: Any, model: Path) -> None:
    session, fresh = load(model), load(model)
    prompt = list(range(40, 80))
    said, usage = tokens(session, prompt, max_tokens=5)
    assert usage.reused_tokens == 0
    longer = [*prompt, *said, 7, 8]
    more, usage = tokens(session, longer, max_tokens=5)
    assert usage.reused_tokens == len(prompt) + 4  # the last token was never evaluated
    assert more == tokens(fresh, longer, max_tokens=5)[0]
    assert tokens(session, prompt, max_tokens=5)[0] == said


def test_a_cancelled_answer_says_so_and_the_next_is_whole(load: Any, model: Path) -> None:
    session, cancel, got = load(model), Cancel(), []
    for delta in session.generate([10, 11], Sampling(max_tokens=100), cancel):
        got.append(delta)
        if len(got) == 3:
            cancel.set()
    assert got[-1].usage is not None and got[-1].usage.finish_reason == "cancel" and len(got) == 4
    before: Cancel = Cancel()
    before.set()
    (only,) = session.generate([9, 9, 9], Sampling(), before)
    assert only.usage is not None and only.usage.completion_tokens == 0 and only.usage.finish_reason == "cancel"
    assert len(tokens(session, [10, 11], max_tokens=9)[0]) == 9


def test_a_cancel_in_the_prompt_leaves_the_cache_right(load: Any, model: Path) -> None:
    session, prompt = load(model, batch=2), list(range(200))
    cancel: Cancel = Cancel()
    timer = threading.Timer(0.002, cancel.set)
    timer.start()
    list(session.generate(prompt, Sampling(max_tokens=50), cancel))
    timer.join()
    np.testing.assert_allclose(session.score(prompt, 190), load(model).score(prompt, 190), atol=1e-3)


def test_an_answer_ends_when_the_session_is_used_for_something_else(load: Any, model: Path) -> None:
    session = load(model)
    stream = session.generate([10, 11], Sampling(max_tokens=9))
    next(stream)
    session.score([1, 2, 3])
    with pytest.raises(UsageError, match="used for something else"):
        next(stream)


def test_the_context_is_filled_and_no_more(load: Any, model: Path) -> None:
    session = load(model, context=32)
    said, usage = tokens(session, list(range(30)), max_tokens=50)
    assert session.context == 32 and usage.finish_reason == "length" and len(said) == 3
    with pytest.raises(ModelError, match="the context holds 32"):
        tokens(session, list(range(32)))
    with pytest.raises(ModelError, match="the context holds 32"):
        session.score(list(range(33)))
    assert session.score(list(range(32))).shape == (32, 260)
    assert load(model).context == 256  # the model's own


def test_what_cannot_be_done_is_refused(load: Any, model: Path) -> None:
    session = load(model)
    with pytest.raises(UsageError, match="JSON schema"):
        tokens(session, [1], json_schema={"type": "object"})
    with pytest.raises(ModelError, match="takes no adapters"):
        session.set_adapters([AdapterScale(Path("x.gguf"))])
    session.set_adapters([])
    with pytest.raises(UsageError, match="prompt is empty"):
        tokens(session, [])
    with pytest.raises(UsageError, match="nothing to score"):
        session.score([1], 1)
    session.close()
    session.close()
    with pytest.raises(ModelError, match="closed"):
        session.tokenize("x")


# --- Bad folders ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files",
    [
        {"model__onnx": None},
        {"model__onnx": "not a graph"},
        {"tokenizer__json": None},
        {"tokenizer__json": "{}"},
        {"genai_config__json": "{"},
        {"genai_config__json": "{}"},
    ],
    ids=lambda files: "{}={}".format(*next(iter(files.items()))),
)
def test_a_damaged_folder_is_a_model_error(load: Any, model: Path, tmp_path: Path, files: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        load(changed(model, tmp_path / "x", **files))


def test_weights_cut_short_are_a_model_error(load: Any, model: Path, tmp_path: Path) -> None:
    folder = changed(model, tmp_path / "x")
    data = folder / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(ModelError):
        load(folder)


def test_only_onnx_folders_are_supported(runtime: Any, model: Path, tmp_path: Path) -> None:
    assert runtime.supports(Artifact(model)).ok
    assert not runtime.supports(Artifact(tmp_path)).ok
    assert not runtime.supports(Artifact(model / "model.onnx")).ok


def test_telemetry_is_off_and_torch_is_not_loaded(runtime: Any, model: Path) -> None:
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from edgeft import plugins\n"
        "from edgeft.artifact import Artifact\n"
        f"runtime, folder = plugins.load('runtimes', {runtime.name!r}), Path({str(model)!r})\n"
        "session = runtime.load(Artifact(folder), plugins.LoadOptions())\n"
        "session.score([1, 2])\n"
        "print(os.environ['ORT_DISABLE_TELEMETRY'], 'torch' in sys.modules, 'transformers' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False", "False"]


# --- The sampler ------------------------------------------------------------------------

CHANCES = np.array([0.5, 0.25, 0.15, 0.1], np.float32)
FREE = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def drawn(count: int = 4000, prompt: tuple[int, ...] = (), **sampling: Any) -> np.ndarray:
    sampler = Sampler(Sampling(**{**FREE, **sampling}), prompt)
    return np.bincount([sampler.choose(np.log(CHANCES)) for _ in range(count)], minlength=4) / count


def test_tokens_are_drawn_with_their_probabilities() -> None:
    np.testing.assert_allclose(drawn(), CHANCES, atol=0.03)


def test_a_temperature_flattens() -> None:
    flat = CHANCES**0.5 / (CHANCES**0.5).sum()
    np.testing.assert_allclose(drawn(temperature=2.0), flat, atol=0.03)


@pytest.mark.parametrize(
    ("limit", "left"),
    [
        ({"top_k": 2}, 2),
        ({"top_p": 0.7}, 2),
        ({"top_p": 0.76}, 3),
        ({"top_p": 0.0}, 1),
        ({"min_p": 0.4}, 2),
        ({"min_p": 0.25}, 3),
        ({"top_k": 99}, 4),
    ],
)
def test_limits_cut_the_tail(limit: dict[str, float], left: int) -> None:
    kept = CHANCES[:left] / CHANCES[:left].sum()
    np.testing.assert_allclose(drawn(**limit), np.pad(kept, (0, 4 - left)), atol=0.03)


def test_a_repeat_penalty_counts_prompt_and_answer() -> None:
    greedy = Sampler(Sampling(repeat_penalty=3.0), [0])
    logits = np.array([2.0, 1.5, -0.1, -1.0], np.float32)
    assert [greedy.choose(logits) for _ in range(3)] == [1, 0, 0]


def test_log_softmax_survives_large_logits() -> None:
    rows = log_softmax(np.array([[1e4, 1e4 - 1, -1e4]], np.float32))
    np.testing.assert_allclose(np.exp(rows).sum(), 1, rtol=1e-6)
