"""The ledger: every step from the trained graph to the runtime is what it says it is, and its figures are right."""

from __future__ import annotations

import html
import json
import re
import xml.etree.ElementTree
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import parity_cases as parity
import pytest
import tiny
import tiny_families
import tiny_gguf
from edgeft.converters import ggml
from numpy.typing import NDArray
from test_adapter_files import base_file, f32_file
from test_train_runs import settings, write_examples

from edgeft.artifact import read_manifest
from edgeft.cli.main import main
from edgeft.data.example import Encoded, Example
from edgeft.errors import CheckFailed, UnsupportedModel
from edgeft.models.gguf_header import TENSOR_TYPES, GgufHeader, TensorInfo, read_header
from edgeft.models.gguf_values import packed_rows, slabs, values
from edgeft.plugins import AdapterScale, Source
from edgeft.sessions import open_session
from edgeft.train import train
from edgeft.verify.advice import Shipped, advice
from edgeft.verify.bootstrap import Draws, Interval
from edgeft.verify.build_steps import Parts
from edgeft.verify.check import Compared, verify_file
from edgeft.verify.gguf_tensors import load_gguf_tensors
from edgeft.verify.html_report import page
from edgeft.verify.ledger import Ledger, Row, measure
from edgeft.verify.report import Finding, Report
from edgeft.verify.steps import Skipped, Step, in_runtime
from edgeft.verify.torch_reference import load_reference

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated.*"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TOKENS = np.random.default_rng(0).integers(3, 256, 60).tolist()
Floats = NDArray[np.float32]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and two thread pools that wait for each other lose much."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def kl(expected: Any, got: Any) -> float:
    """Mean over rows, nats."""
    return float((np.exp(expected) * (expected - got)).sum(-1).mean())


# --- A GGUF's tensors, read without the runtime ------------------------------------------


READABLE = [
    name for name, _, _ in TENSOR_TYPES.values() if name[0] in "QITMBF" and name not in ("Q1_0", "NVFP4", "F64")
]


@pytest.mark.parametrize("kind", [name for name in READABLE if not name.startswith("I") or name.startswith("IQ")])
def test_numpy_reads_every_type_as_ggml_does(kind: str, tmp_path: Path) -> None:
    """Random bytes, so that every code, scale and minimum occurs."""
    weights, size = next((w, s) for name, w, s in TENSOR_TYPES.values() if name == kind)
    columns, rows = 512, 6
    packed = np.random.default_rng(1).integers(0, 256, (rows, columns // weights * size), np.uint8)
    (tmp_path / "x").write_bytes(b"head" + packed.tobytes())
    info = TensorInfo("x", (columns, rows), kind, 0, packed.size)
    header = GgufHeader(tmp_path / "x", 3, None, (info,), 4)  # type: ignore[arg-type]
    assert (packed_rows(header, info) == packed).all()
    found = values(header, info)
    if kind in ggml.TYPES:
        expected = ggml.load().dequantize(ggml.TYPES[kind], packed, columns)
        # Where two roundings meet, the order of products may show in the last bit.
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=0)
    parts = list(slabs(header, info, 2 * columns))
    assert [start for start, _ in parts] == [0, 2, 4]
    np.testing.assert_array_equal(np.concatenate([part for _, part in parts]), found)


@pytest.mark.parametrize("case", tiny_families.COMPUTED, ids=lambda case: case.label)
def test_a_files_tensors_are_the_model_they_came_from(case: Any, tmp_path: Path) -> None:
    base = tiny_families.build(tmp_path / "base", case, spread=0.2)
    file = parity.export(base, "gguf-f16", tmp_path / "base.gguf")
    if case.family == "qwen3moe" or case.variant == "norms":  # stacked: not transformers' own tensors
        with pytest.raises(UnsupportedModel):
            load_gguf_tensors(file, base)
        return
    expected = load_reference(base, None).log_probs(TOKENS, range(len(TOKENS)))
    got = load_gguf_tensors(file, base).log_probs(TOKENS, range(len(TOKENS)))
    assert np.std(expected) > 0.3
    assert kl(expected, got) < 1e-6


def test_quantized_tensors_answer_as_the_runtime_does(tmp_path: Path) -> None:
    """The runtime's own rounding of activations is small beside that of the weights."""
    base = tiny.write_loadable(tmp_path / "base", hidden_size=256, intermediate_size=512, head_dim=64)
    file = base_file(base, "gguf-q4_k_m")
    rows = range(len(TOKENS))
    exact = load_reference(base, None).log_probs(TOKENS, rows)
    stored = load_gguf_tensors(file, base).log_probs(TOKENS, rows)
    with open_session(str(file), "xllamacpp").session as session:
        run = session.score(TOKENS)
    assert kl(stored, run) < kl(exact, stored) / 5


@pytest.mark.parametrize(
    "adapter",
    [
        {"target_modules": ["q_proj", "k_proj", "down_proj"], "lora_alpha": 800},
        {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"q_proj": 2}, "lora_alpha": 80},
        {"target_modules": ["o_proj", "up_proj"], "alpha_pattern": {"up_proj": 640}, "lora_alpha": 80},
    ],
)
def test_an_adapters_file_adds_what_peft_adds(adapter: dict[str, Any], tmp_path: Path) -> None:
    base = tiny.write_loadable(tmp_path / "base")
    tiny.write_adapter(base, tmp_path / "adapter", **adapter)
    out = tmp_path / "a.gguf"
    command = ["export", base, "--adapter", tmp_path / "adapter", "--to", "gguf-lora", "--out", out, "--no-verify"]
    assert main([str(part) for part in command]) == 0
    expected = load_reference(base, tmp_path / "adapter").log_probs(TOKENS, range(len(TOKENS)))
    file = f32_file(base)
    got = load_gguf_tensors(file, base, [AdapterScale(out)]).log_probs(TOKENS, range(len(TOKENS)))
    np.testing.assert_allclose(got, expected, atol=2e-4)
    plain = load_gguf_tensors(file, base).log_probs(TOKENS, range(len(TOKENS)))
    half = load_gguf_tensors(file, base, [AdapterScale(out, 0.5)]).log_probs(TOKENS, range(len(TOKENS)))
    assert kl(expected, plain) > 100 * max(kl(expected, got), 1e-7)
    assert kl(expected, half) > 10 * max(kl(expected, got), 1e-7)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_and_a_vocabulary_that_the_base_did_not_have(tied: bool, tmp_path: Path) -> None:
    """What an adapter unties or adds is in the file; the base's configuration does not know of it."""
    base = tiny.write_loadable(tmp_path / "base", tie_word_embeddings=tied)
    file = base_file(base)
    config = json.loads((base / "config.json").read_text())
    other = {**config, "tie_word_embeddings": not tied, "vocab_size": config["vocab_size"] - 2}
    (base / "config.json").write_text(json.dumps(other))
    got = load_gguf_tensors(file, base).log_probs(TOKENS, range(len(TOKENS)))
    with open_session(str(file), "xllamacpp").session as session:
        assert kl(session.score(TOKENS), got) < 1e-5


# --- An ONNX directory's -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "given", "model"),
    [
        ("onnx-fp32", [], {}),
        ("onnx-int8", [], {}),
        ("onnx-q4", [], {}),
        ("onnx-q4", [], {"tie_word_embeddings": False}),
        ("onnx-q4", ["method=rtn", "symmetric=yes", "block=16"], {}),
        ("onnx-q4", ["method=hqq"], {}),
        ("onnx-q4", ["head-bits=4", "block=64"], {"kind": "qwen2"}),
    ],
    ids=str,
)
def test_a_graphs_matrices_are_what_onnxruntime_computes_with(
    target: str, given: list[str], model: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime_genai")
    from edgeft.verify.onnx_tensors import load_onnx_tensors

    base = tiny.write_model(tmp_path / "base", **model)
    tiny.write_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"], lora_alpha=300)
    # Level 1 keeps activations in float32: what is left is the weights.
    chosen = [*given, "accuracy-level=1"] if target != "onnx-fp32" else given
    options = [part for setting in chosen for part in ("--set", setting)]
    out = tmp_path / "x-onnx"
    command = ["export", base, "--adapter", tmp_path / "adapter", "--to", target, *options, "--out", out, "--no-verify"]
    assert main([str(part) for part in command]) == 0
    merged = load_reference(base, tmp_path / "adapter")
    stored = load_onnx_tensors(out, merged).log_probs(TOKENS, range(len(TOKENS)))
    with open_session(str(out), "onnxruntime").session as session:
        run = session.score(TOKENS)
    assert kl(stored, run) < 1e-6
    exact = merged.log_probs(TOKENS, range(len(TOKENS)))
    assert (float(np.abs(exact - stored).max()) < 1e-4) == (target == "onnx-fp32")


# --- Figures -------------------------------------------------------------------------------


def scripted(seed: int, sharp: float, vocabulary: int = 11) -> Callable[[Sequence[int], Sequence[int]], Floats]:
    """Log-probabilities that depend on the last token alone."""
    logits = np.random.default_rng(seed).normal(size=(vocabulary, vocabulary)) * sharp
    table = (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)
    return lambda tokens, rows: table[[tokens[row] for row in rows]]


def examples(count: int = 7, length: int = 9) -> list[Encoded]:
    random = np.random.default_rng(5)
    return [
        Encoded(random.integers(0, 11, length + at).tolist(), [place > 2 for place in range(length + at)])
        for at in range(count)
    ]


STEPS = [
    Step("trained", scripted(1, 1.0)),
    Step("merged", scripted(2, 1.1)),
    Step("tensors", scripted(2, 1.3), 100),
    Step("file", scripted(2, 1.35), 100),
]


def test_the_figures_are_the_textbooks() -> None:
    encoded = examples()
    ledger = measure(STEPS, "merged", encoded, 11)
    pairs = [(e.tokens, row) for e in encoded for row in range(len(e.tokens) - 1) if e.learned[row + 1]]
    tables = [np.concatenate([step.log_probs(tokens, [row]) for tokens, row in pairs]) for step in STEPS]
    targets = [tokens[row + 1] for tokens, row in pairs]
    merged = tables[1]
    for at, row in enumerate(ledger.rows):
        table = tables[at]
        each = (np.exp(merged) * (merged - table)).sum(1)
        assert row.nll.value == pytest.approx(-table[range(len(pairs)), targets].mean(), rel=1e-5)
        assert row.perplexity.value == pytest.approx(np.exp(row.nll.value))
        assert row.kl.value == pytest.approx(each.mean(), rel=1e-4, abs=1e-7)
        assert row.kl_p99.value == pytest.approx(np.sort(each)[int(np.ceil(0.99 * len(each))) - 1], rel=1e-4, abs=1e-6)
        assert row.kl_worst == pytest.approx(each.max(), rel=1e-4, abs=1e-6)
        assert row.same_top.value == (table.argmax(1) == merged.argmax(1)).mean()
        if at:
            before = tables[at - 1]
            lost = (np.exp(before) * (before - table)).sum(1).mean()
            assert row.lost is not None and row.lost.value == pytest.approx(lost, rel=1e-4, abs=1e-7)
            assert row.nll_change is not None
            assert row.nll_change.value == pytest.approx(row.nll.value - ledger.rows[at - 1].nll.value, abs=1e-6)
    assert (ledger.tokens, ledger.examples) == (len(pairs), len(encoded))
    assert ledger.rows[1].kl.value == 0 and ledger.rows[1].same_top.value == 1


def test_the_step_that_loses_most_is_named() -> None:
    worst = measure(STEPS, "merged", examples(), 11).loses_most
    assert worst is not None and worst.name == "merged", "another table altogether, seed 1 against 2"
    worst = measure(STEPS[1:], "merged", examples(), 11).loses_most
    assert worst is not None and worst.name == "tensors"


def test_rows_are_held_a_few_at_a_time() -> None:
    """With a vocabulary of a million, eight rows of float32 are 32 MB."""
    asked: list[int] = []
    table = scripted(1, 1.0)

    def log_probs(tokens: Sequence[int], rows: Sequence[int]) -> Floats:
        asked.append(rows[-1] - rows[0] + 1)
        return table(tokens, rows)

    measure([Step("merged", log_probs)], "merged", examples(2, 300), 1 << 20)
    assert max(asked) <= 8 and sum(asked) == 297 + 298


def test_nan_and_another_vocabulary_are_refused() -> None:
    nan = Step("file", lambda tokens, rows: np.full((len(rows), 11), np.nan, np.float32))
    with pytest.raises(CheckFailed, match="not finite"):
        measure([STEPS[1], nan], "merged", examples(), 11)
    with pytest.raises(CheckFailed, match="12 tokens, the model 11"):
        measure([STEPS[1], Step("file", scripted(1, 1.0, 12))], "merged", examples(), 11)


def test_the_tokens_that_changed_most_are_kept() -> None:
    encoded = examples()
    ledger = measure(STEPS, "merged", encoded, 11)
    first = ledger.changed[0]
    assert first.kl == ledger.rows[-1].kl_worst
    assert [token.kl for token in ledger.changed] == sorted((token.kl for token in ledger.changed), reverse=True)
    last = first.tokens[-1]
    assert first.reference == pytest.approx(np.exp(STEPS[1].log_probs([last], [0])[0, first.token]), rel=1e-5)
    assert first.file == pytest.approx(np.exp(STEPS[3].log_probs([last], [0])[0, first.token]), rel=1e-5)
    text = ",".join(map(str, encoded[first.example].tokens))
    assert ",".join(map(str, (*first.tokens, first.token))) in text


# --- How sure they are ------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_that_of_the_central_limit() -> None:
    random = np.random.default_rng(3)
    values = random.normal(2.0, 1.0, 400).astype(np.float32)
    interval = Draws(np.arange(400)).per_token(values)
    assert interval.value == pytest.approx(values.mean(), rel=1e-6)
    assert interval.low is not None and interval.high is not None
    assert interval.high - interval.low == pytest.approx(2 * 1.96 / 20, rel=0.12)


def test_ninety_five_of_a_hundred_intervals_hold_the_truth() -> None:
    random, held = np.random.default_rng(4), 0
    for _ in range(200):
        # Tokens of one example hang together: ten of them are hardly more than one.
        shared = np.repeat(random.normal(size=60), 10) + 0.1 * random.normal(size=600)
        interval = Draws(np.repeat(np.arange(60), 10), draws=300).per_token(shared.astype(np.float32))
        assert interval.low is not None and interval.high is not None
        held += interval.low <= 0 <= interval.high
    assert 180 <= held <= 198


def test_what_two_steps_have_in_common_falls_out_of_their_difference() -> None:
    random = np.random.default_rng(6)
    hard = random.normal(5.0, 3.0, 200)
    draws = Draws(np.arange(200))
    one, other = (hard + random.normal(0, 0.1, 200) + shift for shift in (0.0, 0.05))
    alone, apart = draws.per_token(one.astype(np.float32)), draws.per_token((other - one).astype(np.float32))
    assert alone.low is not None and alone.high is not None and apart.low is not None and apart.high is not None
    assert apart.high - apart.low < (alone.high - alone.low) / 10
    assert apart.low > 0


def test_the_percentile_is_what_so_many_tokens_do_not_exceed() -> None:
    values = np.random.default_rng(7).permutation(1000).astype(np.float32)
    interval = Draws(np.arange(1000)).percentile(values, 0.99)
    assert interval.value == 989
    assert interval.low is not None and interval.high is not None
    assert 975 < interval.low < 989 < interval.high <= 999


def test_one_example_has_no_interval() -> None:
    assert Draws(np.zeros(5, np.int64)).per_token(np.arange(5, dtype=np.float32)) == Interval(2.0)


# --- What to try -------------------------------------------------------------------------------


def row(name: Any, lost: float | None) -> Row:
    sure = Interval(0.0)
    return Row(name, name, sure, sure, sure, 0.0, sure, None, None, (0.0,), lost and Interval(lost))  # type: ignore[arg-type]


def ledger_of(**lost: float | None) -> Ledger:
    return Ledger(tuple(row(name, value) for name, value in lost.items()), "merged", 2, 10)


BASE = Path("base")
GGUF_Q4 = Shipped(Source(BASE, Path("adapter")), False, False, 4.5, 90_000_000)


@pytest.mark.parametrize(
    ("ledger", "shipped", "said"),
    [
        (ledger_of(trained=None, merged=0.5, tensors=0.1, file=0.2), GGUF_Q4, "gguf-lora"),
        (ledger_of(trained=None, merged=0.1, tensors=0.5, file=0.2), GGUF_Q4, "--fit 90MB.*--to gguf-q5_k_m"),
        (ledger_of(merged=None, file=0.2), GGUF_Q4, "--fit 90MB"),
        (ledger_of(merged=None, tensors=0.1, file=0.2), GGUF_Q4, "activations to 8 bits"),
        (ledger_of(merged=None, tensors=1e-5, file=1e-6), GGUF_Q4, "No step loses anything to speak of"),
        (
            ledger_of(merged=None, tensors=0.1, file=0.01),
            Shipped(Source(BASE), True, False, 5.0, 9),
            "--set block=16",
        ),
        (
            ledger_of(merged=None, tensors=0.01, file=0.1),
            Shipped(Source(BASE), True, False, 5.0, 9),
            "accuracy-level",
        ),
        (
            ledger_of(merged=None, tensors=0.5, file=0.1),
            Shipped(Source(BASE, Path("a")), False, True, 5.3, 9),
            "train --model BASE.gguf",
        ),
    ],
)
def test_the_fix_belongs_to_the_step(ledger: Ledger, shipped: Shipped, said: str) -> None:
    assert re.search(said, advice(ledger, shipped)), advice(ledger, shipped)


def test_limits_apply_to_the_last_step() -> None:
    ledger = measure([*STEPS[:2], Step("file", scripted(3, 1.0))], "merged", examples(), 11)
    compared, last = Compared.of(ledger), ledger.rows[-1]
    assert last.same_top.value < 1
    assert (compared.kl, compared.top1, compared.nll_file) == (last.kl.value, last.same_top.value, last.nll.value)
    assert compared.nll_reference == ledger.rows[1].nll.value


def test_nothing_in_a_page_is_taken_for_markup() -> None:
    """Names of files and what a model was asked come from elsewhere."""
    evil = "<script>alert('1')</script>"
    steps = [STEPS[1], Step("file", STEPS[3].log_probs, 100, title=evil)]
    ledger = measure(steps, "merged", examples(), 11, skipped=[Skipped("trained", evil)])
    report = Report((Finding(evil, False, evil),), {}, ledger, evil)
    made = page(report, {"model": evil, "artifact": evil, "data": evil}, lambda tokens: evil)
    assert "<script" not in made
    assert made.count("&lt;script&gt;") > 20


# --- Exact match without generating ---------------------------------------------------------------


@pytest.mark.parametrize("answer", [tiny_gguf.ANSWER, tiny_gguf.ANSWER[:-1], "other"])
def test_exact_match_is_what_greedy_decoding_gives(answer: str, tmp_path: Path) -> None:
    from edgeft.data.encode import encode_all
    from edgeft.evaluate import predict
    from edgeft.verify.facts import read_facts
    from edgeft.verify.text_checks import session_tokenize

    file = tiny_gguf.write_scripted(tmp_path / "x.gguf", tiny_gguf.chain_of(tiny_gguf.ANSWER))
    turns = ({"role": "user", "content": "say it"}, {"role": "assistant", "content": answer})
    with open_session(str(file), "xllamacpp").session as session:
        facts = read_facts(file)
        assert facts.template is not None
        encoded = encode_all([Example(turns)], facts.template, session_tokenize(session), facts.ends).encoded
        ledger = measure([Step("file", in_runtime(session))], "file", encoded, session.vocabulary)
        (prediction,) = predict(session, [Example(turns)])
    assert ledger.rows[0].exact is not None
    assert ledger.rows[0].exact.value == float(prediction.exact) == float(answer == tiny_gguf.ANSWER)


# --- The command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, data/, and run/, a QLoRA run."""
    folder = tmp_path_factory.mktemp("ledger")
    tiny.write_loadable(folder / "base", dtype="bfloat16")
    (folder / "data").mkdir()
    for split, count in (("train", 40), ("valid", 6), ("test", 6)):
        write_examples(folder / "data" / f"{split}.jsonl", count)
    train(settings(folder / "base", folder / "data", folder / "run", method="qlora", learning_rate=5e-2))
    return folder


def exported(folder: Path, target: str) -> Path:
    out = folder / (f"x-{target}" + ("" if target.startswith("onnx") else ".gguf"))
    if not out.exists():
        assert main(["export", str(folder / "run"), "--to", target, "--out", str(out), "--no-verify"]) == 0
    return out


@pytest.mark.parametrize("target", ["gguf-q4_0", "gguf-q8_0", "onnx-q4"])
def test_every_step_of_a_run(target: str, folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if target.startswith("onnx"):
        pytest.importorskip("onnxruntime_genai")
    file = exported(folder, target)
    capsys.readouterr()
    reports = ["--report", str(tmp_path / "r.html"), "--report", str(tmp_path / "r.json")]
    assert main(["verify", str(folder / "run"), str(file), "--json", *reports]) == 0
    found = json.loads(capsys.readouterr().out)
    ledger = found["ledger"]
    assert [step["step"] for step in ledger["steps"]] == ["trained", "merged", "tensors", "file"]
    assert ledger["skipped"] == [] and ledger["reference"] == "merged"
    # The graph is the one that training scored.
    assert found["nll_trained"] == pytest.approx(found["nll_training_graph"], abs=2e-3)
    last = ledger["steps"][-1]
    assert (found["kl"], found["top1_agreement"]) == (last["kl"]["value"], last["same_top"]["value"])
    assert found["nll_file"] == last["nll"]["value"] and found["kl_worst_token"] == last["kl_worst_token"]
    for step in ledger["steps"]:
        assert step["nll"]["low"] <= step["nll"]["value"] <= step["nll"]["high"]
        assert 0 <= step["same_top"]["value"] <= 1 and step["kl"]["value"] >= 0
    sizes = {step["step"]: step["bytes"] for step in ledger["steps"]}
    made = read_manifest(file)
    assert made is not None and sizes["file"] == sizes["tensors"] == made.bytes
    assert json.loads((tmp_path / "r.json").read_text())["ledger"] == ledger
    check_manifest(file, found)
    check_page((tmp_path / "r.html").read_text(), found)


def check_manifest(file: Path, found: dict[str, Any]) -> None:
    made = read_manifest(file)
    assert made is not None
    assert dict(made.ledger) == {name: found[name] for name in ("nll_training_graph", "nll_merged", "nll_file")}
    assert made.verification["steps"] == found["ledger"]["steps"]
    assert made.verification["advice"] == found["advice"] and made.verification["split"] == "test"


def check_page(page: str, found: dict[str, Any]) -> None:
    """Nothing in it is fetched or run, and the figures are in it."""
    assert not re.search(r"<script|<link|<img|<iframe|src=|href=|url\(|@import|https?:", page)
    assert page.count("<svg") == 3
    for step in found["ledger"]["steps"]:
        assert html.escape(step["title"]) in page and f"{step['nll']['value']:.4f}" in page
    for drawing in re.findall(r"<svg.*?</svg>", page, re.S):
        xml.etree.ElementTree.fromstring(drawing)
    assert "nan" not in page.lower()


@pytest.mark.parametrize("method", ["lora", "full", "gguf"])
def test_the_trained_graph_of_every_method(
    method: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also of a run on a GGUF that is merged after all: its graph had that file's weights."""
    base = base_file(folder / "base", "gguf-q4_0") if method == "gguf" else folder / "base"
    train(settings(base, folder / "data", tmp_path / "run", method=method, learning_rate=1e-2))
    out = tmp_path / "x.gguf"
    assert main(["export", str(tmp_path / "run"), "--to", "gguf-q8_0", "--out", str(out), "--no-verify"]) == 0
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "run"), str(out), "--runtime", "xllamacpp", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["nll_trained"] == pytest.approx(found["nll_training_graph"], abs=2e-3)
    assert [step["step"] for step in found["ledger"]["steps"]] == ["trained", "merged", "tensors", "file"]


def test_an_adapter_beside_its_base(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = base_file(folder / "base", "gguf-q4_0")
    train(settings(base, folder / "data", tmp_path / "run", method="gguf", learning_rate=1e-2))
    out = tmp_path / "x.gguf"
    assert main(["export", str(tmp_path / "run"), "--out", str(out), "--no-verify"]) == 0
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "run"), str(out), "--runtime", "xllamacpp", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["ledger"]
    assert found["reference"] == "unmerged" and found["skipped"] == []
    assert [step["step"] for step in found["steps"]] == ["trained", "unmerged", "tensors", "file"]
    tensors = found["steps"][2]
    assert tensors["kl"]["value"] < 1e-7, "the same weights, read by numpy instead of ggml"
    assert tensors["bytes"] == base.stat().st_size + out.stat().st_size


def test_a_part_of_the_data_is_not_written_down(folder: Path, tmp_path: Path) -> None:
    file = exported(folder, "gguf-q5_0")
    assert main(["verify", str(folder / "run"), str(file), "--examples", "2"]) == 0
    made = read_manifest(file)
    assert made is not None and not made.ledger and not made.verification


def test_what_is_left_out_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "plain.gguf"
    assert main(["export", str(folder / "base"), "--to", "gguf-q8_0", "--out", str(out), "--no-verify"]) == 0
    capsys.readouterr()
    assert main(["verify", str(folder / "base"), str(out), "--data", str(folder / "data")]) == 0
    said = capsys.readouterr()
    assert "“trained” is left out: there is no run" in said.err
    assert "merged, not quantized" in said.out and "the file's tensors in torch" in said.out


def test_quick_leaves_out_what_takes_another_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = exported(folder, "gguf-q8_0")
    capsys.readouterr()
    assert main(["verify", str(folder / "run"), str(file), "--quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["ledger"]
    assert [step["step"] for step in found["steps"]] == ["merged", "file"]
    assert found["skipped"] == [{"step": step, "why": "--quick"} for step in ("trained", "tensors")]


def test_only_pages_and_json_are_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = exported(folder, "gguf-q8_0")
    assert main(["verify", str(folder / "run"), str(file), "--report", "r.pdf"]) == 2
    assert "neither FILE.html nor FILE.json" in capsys.readouterr().err


def test_models_show_tells_the_ledger(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = exported(folder, "gguf-q6_k")
    capsys.readouterr()
    assert main(["verify", str(folder / "run"), str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["models", "show", str(file), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["ledger"] == {name: found[name] for name in ("nll_training_graph", "nll_merged", "nll_file")}
    assert main(["models", "show", str(file)]) == 0
    assert f"nll_file {found['nll_file']:.4f}" in capsys.readouterr().out


def test_a_damaged_tensor_is_seen_before_the_runtime(folder: Path, tmp_path: Path) -> None:
    """One matrix with its signs turned: the step of the tensors says so, not the runtime's."""
    file = exported(folder, "gguf-f16")
    header = read_header(file)
    info = next(tensor for tensor in header.tensors if tensor.name == "blk.1.ffn_down.weight")
    content = bytearray(file.read_bytes())
    start = header.data_offset + info.offset
    turned = -np.frombuffer(bytes(content[start : start + info.bytes]), np.float16)
    content[start : start + info.bytes] = turned.tobytes()
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(content)
    from edgeft.data.load import load_split
    from edgeft.export import find
    from edgeft.progress import Silent

    source = find(str(folder / "run"), None, Silent()).source
    with open_session(str(bad), "xllamacpp").session as session:
        report = verify_file(Parts(source, bad, session), load_split(str(folder / "data"), "test"))
    assert not report.ok and report.ledger is not None and report.ledger.loses_most is not None
    assert report.ledger.loses_most.name == "tensors"
    last = report.ledger.rows[-1].lost
    assert last is not None and last.value < 1e-3
