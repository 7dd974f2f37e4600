"""What holds for llama.cpp, whichever package brings it: templates, samplers, JSON, adapters, bad files."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest
import tiny_gguf
from edgeft.runtimes import llama_api
from edgeft.runtimes.memory import available_bytes
from tiny_gguf import END_OF_TEXT, IM_END, TWO_SPACES, chain_of, write_adapter, write_random, write_scripted

from edgeft import plugins
from edgeft.artifact import Artifact
from edgeft.chat import Sampling
from edgeft.errors import ModelError, PluginError, UsageError
from edgeft.plugins import AdapterScale, LoadOptions, Session

REQUIRED = os.environ.get("EDGEFT_TEST_REQUIRE", "").split(",")
ASK = [{"role": "user", "content": "hi"}]


@pytest.fixture(params=["xllamacpp", "llama-cpp-python"])
def runtime(request: pytest.FixtureRequest) -> Any:
    found = plugins.load("runtimes", request.param)
    if found.find_library() is None and request.param not in REQUIRED:
        pytest.skip(f"{request.param} is not installed")
    return found


@pytest.fixture
def load(runtime: Any) -> Iterator[Any]:
    opened: list[Session] = []

    def load_(path: Path, **options: Any) -> Session:
        opened.append(runtime.load(Artifact(path), LoadOptions(**{"threads": 1, "threads_batch": 1, **options})))
        return opened[-1]

    yield load_
    for session in opened:
        session.close()


@pytest.fixture(scope="module")
def random_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("random") / "random.gguf")


@pytest.fixture(scope="module")
def babbler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # The ends of strings, lists and objects, lest they go on for ever.
    likely = {'"': 4.0, "]": 3.0, "}": 3.0, "\\": 2.0}
    return tiny_gguf.write_babbler(tmp_path_factory.mktemp("babbler") / "babbler.gguf", **likely)


def say(session: Session, prompt: str = "\n", **sampling: Any) -> str:
    return "".join(delta.text for delta in session.generate(session.tokenize(prompt), Sampling(**sampling)))


# --- Template and tokens ---------------------------------------------------------------


def test_the_files_own_template_is_rendered_with_its_control_tokens(load: Any, tmp_path: Path) -> None:
    session = load(write_scripted(tmp_path / "m.gguf", {}))
    tokens = session.render([{"role": "system", "content": "be  kind"}, *ASK])
    assert [token for token in tokens if token > 255] == [257, 258, 257, 258, 257]
    assert session.tokenize("  ") == [TWO_SPACES]
    assert session.detokenize(tokens) == "system\nbe  kind\nuser\nhi\nassistant\n"


@pytest.mark.parametrize(
    ("template", "add_bos", "count"),
    [
        ("{{ bos_token }}{{ messages[0].content }}", True, 1),
        ("{{ bos_token }}{{ messages[0].content }}", False, 1),
        ("{{ messages[0].content }}", True, 1),
        ("{{ messages[0].content }}", False, 0),
    ],
)
def test_there_is_one_bos_token_or_none(load: Any, tmp_path: Path, template: str, add_bos: bool, count: int) -> None:
    session = load(write_scripted(tmp_path / "m.gguf", {}, template=template, add_bos=add_bos))
    assert session.render(ASK) == [END_OF_TEXT] * count + [ord("h"), ord("i")]
    assert session.tokenize("hi", bos=True) == [END_OF_TEXT] * add_bos + [ord("h"), ord("i")]
    assert session.tokenize("hi") == [ord("h"), ord("i")]


def test_control_tokens_in_plain_text_are_text_unless_asked_for(load: Any, random_gguf: Path) -> None:
    session = load(random_gguf)
    assert session.tokenize("<|im_end|>", special=True) == [IM_END]
    assert session.tokenize("<|im_end|>") == list(b"<|im_end|>")


def test_a_template_that_refuses_is_a_model_error(load: Any, tmp_path: Path) -> None:
    session = load(write_scripted(tmp_path / "m.gguf", {}, template="{{ raise_exception('no system role') }}"))
    with pytest.raises(ModelError, match="no system role"):
        session.render(ASK)


def test_a_template_runs_in_a_sandbox(load: Any, tmp_path: Path) -> None:
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    session = load(write_scripted(tmp_path / "m.gguf", {}, template=escape))
    with pytest.raises(ModelError, match="unsafe"):
        session.render(ASK)


def test_text_that_is_no_unicode_is_refused(load: Any, random_gguf: Path) -> None:
    with pytest.raises(UsageError, match="Unicode"):
        load(random_gguf).tokenize("a\udcffb")


@pytest.mark.parametrize("end", [IM_END, END_OF_TEXT], ids=["eos", "another end token"])
def test_every_end_token_ends_the_answer(load: Any, tmp_path: Path, end: int) -> None:
    session = load(write_scripted(tmp_path / "m.gguf", chain_of("so", end=end)))
    deltas = list(session.generate(session.render(ASK), Sampling()))
    assert "".join(delta.text for delta in deltas) == "so"
    assert deltas[-1].usage is not None and deltas[-1].usage.finish_reason == "stop"


# --- Samplers --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Always says a with 84 %, b with 11 %, c with 4 %; anything else is as good as impossible."""
    successors = dict.fromkeys(range(tiny_gguf.VOCABULARY), -30.0) | {ord("a"): 3.0, ord("b"): 1.0, ord("c"): 0.0}
    return write_scripted(
        tmp_path_factory.mktemp("coin") / "coin.gguf", dict.fromkeys(range(tiny_gguf.VOCABULARY), successors)
    )


FREE = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 600}


def test_tokens_are_drawn_with_their_probabilities(load: Any, coin: Path) -> None:
    said = say(load(coin), **FREE, seed=3)
    shares = [said.count(letter) / len(said) for letter in "abc"]
    np.testing.assert_allclose(shares, [0.8438, 0.1142, 0.0420], atol=0.05)


def test_a_temperature_flattens(load: Any, coin: Path) -> None:
    said = say(load(coin), **{**FREE, "temperature": 4.0}, seed=3)
    assert said.count("a") / len(said) == pytest.approx(0.45, abs=0.08)


@pytest.mark.parametrize(
    ("limit", "letters"),
    [({"top_k": 1}, "a"), ({"top_k": 2}, "ab"), ({"top_p": 0.8}, "a"), ({"top_p": 0.9}, "ab"), ({"min_p": 0.1}, "ab")],
    ids=str,
)
def test_limits_cut_the_tail(load: Any, coin: Path, limit: dict[str, float], letters: str) -> None:
    assert set(say(load(coin), **{**FREE, **limit})) == set(letters)


def test_another_seed_says_something_else(load: Any, coin: Path) -> None:
    session = load(coin)
    assert say(session, **FREE, seed=1) == say(session, **FREE, seed=1) != say(session, **FREE, seed=2)


def test_a_repeat_penalty_makes_room_for_others(load: Any, coin: Path) -> None:
    session = load(coin)
    assert say(session, max_tokens=6) == "aaaaaa"
    assert set(say(session, max_tokens=6, repeat_penalty=4.0)) > {"a"}


def test_a_repeat_penalty_counts_the_prompt(load: Any, coin: Path) -> None:
    assert say(load(coin), "a", max_tokens=1, repeat_penalty=4.0) == "b"


def test_log_probabilities_are_those_of_the_model_not_of_the_sampler(load: Any, coin: Path) -> None:
    session = load(coin)
    how = Sampling(max_tokens=1, top_logprobs=3, repeat_penalty=4.0, temperature=0.3)
    first = next(iter(session.generate(session.tokenize("a"), how)))
    assert [token for token, _ in first.top_logprobs] == [ord(letter) for letter in "abc"]
    np.testing.assert_allclose(np.exp([value for _, value in first.top_logprobs]), [0.8438, 0.1142, 0.0420], atol=1e-3)


# --- JSON ------------------------------------------------------------------------------

SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a", "b"]},
    {
        "type": "object",
        "properties": {"a": {"enum": ["on", "off", 1, None]}, "b": {"type": "boolean"}, "c": {"type": "null"}},
        "required": ["b"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 4},
    {"type": "array", "items": {"type": "boolean"}, "maxItems": 0},
    {"type": "string", "minLength": 2, "maxLength": 5},
    {"type": ["string", "null"], "maxLength": 3},
    {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"const": 'a "quoted" \\ word\n'}, "maxItems": 3}]},
    {"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}}},
    {"const": {"nested": ["é", 1.5, True]}},
    {
        "type": "object",
        "properties": {"device": {"type": "string", "enum": ["light"]}, "value": {"type": ["integer", "null"]}},
        "required": ["value", "device"],
        "additionalProperties": False,
        "title": "call",
        "description": "a smart-home call",
    },
    {"type": "object", "properties": {'odd "name"\n': {"type": "null"}}, "required": ['odd "name"\n']},
    {"type": "object", "additionalProperties": {"type": "integer"}},
    {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(24)}, "required": ["p9"]},
    {"type": "string", "enum": ["a", 1]},
    {"oneOf": [{"type": "integer"}, {"type": "string"}, {"type": "null"}]},
    {
        "oneOf": [{"$ref": "#/$defs/on"}, {"$ref": "#/$defs/off"}],
        "$defs": {
            "on": {"properties": {"do": {"const": "on"}, "level": {"type": "integer"}}, "required": ["do", "level"]},
            "off": {"properties": {"do": {"const": "off"}}, "required": ["do"], "additionalProperties": False},
        },
    },
    {"description": "anything"},
    {},
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:40])
def test_whole_answers_validate(load: Any, babbler: Path, schema: dict[str, Any]) -> None:
    session, whole = load(babbler), 0
    for seed in range(12):
        how = Sampling(max_tokens=800, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=seed, json_schema=schema)
        deltas = list(session.generate(session.tokenize("\n"), how))
        assert deltas[-1].usage is not None
        if deltas[-1].usage.finish_reason == "stop":
            whole += 1
            jsonschema.validate(json.loads("".join(delta.text for delta in deltas)), schema)
    assert whole >= 6


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"type": "string", "pattern": "a+"}, "pattern"),
        ({"type": "object", "properties": {"a": {"type": "integer", "minimum": 3}}}, "#/properties/a"),
        ({"allOf": [{"type": "string"}]}, "allOf"),
        ({"type": "string", "not": {"const": "x"}}, "not"),
        ({"enum": [1, 2], "not": {"const": 1}}, "not"),
        ({"anyOf": [{"type": "integer"}], "required": ["a"]}, "required"),
        ({"type": "object", "required": ["a"]}, "required"),
        ({"type": "object", "properties": {"a": {}}, "required": ["b"]}, "b"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"oneOf": [{"const": 1}, {"enum": [1, 2]}]}, "oneOf"),
        ({"type": "string", "enum": [1]}, "enum"),
        ({"minLength": 2}, "type"),
        ({"type": "array", "minItems": 3, "maxItems": 0}, "minItems"),
        ({"type": "string", "minLength": "many"}, "minLength"),
        ({"properties": ["a"]}, "properties"),
        ({"anyOf": []}, "anyOf"),
        ({"$ref": "#/$defs/missing"}, "missing"),
        ({"$ref": "https://example.org/schema"}, "example.org"),
        ({"$ref": "#"}, "#"),
        ({"type": "date"}, "date"),
        ({"type": "array", "items": [{"type": "string"}]}, "items"),
        ({"enum": []}, "enum"),
    ],
    ids=str,
)
def test_a_schema_that_cannot_be_enforced_is_refused_with_its_place(
    load: Any, babbler: Path, schema: dict[str, Any], place: str
) -> None:
    session = load(babbler)
    with pytest.raises(UsageError) as caught:
        list(session.generate(session.tokenize("\n"), Sampling(json_schema=schema, max_tokens=4)))
    assert place in caught.value.message


# --- Adapters --------------------------------------------------------------------------


def delta(rank: int = 4) -> tuple[Any, Any]:
    random = np.random.default_rng(5)
    shapes = (rank, 64), (64, rank)
    return tuple((random.standard_normal(shape) * 0.3).astype(np.float32) for shape in shapes)


def test_an_adapter_is_the_same_as_merged_weights(load: Any, random_gguf: Path, tmp_path: Path) -> None:
    a, b = delta()
    adapter = write_adapter(tmp_path / "a.gguf", "blk.0.attn_q.weight", a, b, alpha=8)
    merged = load(write_random(tmp_path / "merged.gguf", changes={"blk.0.attn_q.weight": 0.5 * (8 / 4) * (b @ a)}))
    session = load(random_gguf)
    tokens = session.tokenize("some words to score")
    before = session.score(tokens)
    session.set_adapters([AdapterScale(adapter, 0.5)])
    np.testing.assert_allclose(session.score(tokens), merged.score(tokens), atol=0.005)
    assert np.abs(session.score(tokens) - before).max() > 0.03
    session.set_adapters([])
    np.testing.assert_allclose(session.score(tokens), before, atol=0.02)


def test_what_was_cached_with_other_weights_is_not_reused(load: Any, random_gguf: Path, tmp_path: Path) -> None:
    session = load(random_gguf)
    prompt = session.tokenize("a prompt of some length")
    list(session.generate(prompt, Sampling(max_tokens=1)))
    session.set_adapters([AdapterScale(write_adapter(tmp_path / "a.gguf", "blk.0.attn_q.weight", *delta(), alpha=8))])
    usage = list(session.generate(prompt, Sampling(max_tokens=1)))[-1].usage
    assert usage is not None and usage.reused_tokens == 0


def test_adapters_that_do_not_belong_are_refused_and_nothing_changes(
    load: Any, random_gguf: Path, tmp_path: Path
) -> None:
    a, b = delta()
    wrong = {
        "other shape": write_adapter(tmp_path / "shape.gguf", "blk.0.attn_q.weight", a[:, :32], b, alpha=8),
        "other tensor": write_adapter(tmp_path / "tensor.gguf", "blk.9.attn_q.weight", a, b, alpha=8),
        "other family": write_adapter(
            tmp_path / "qwen.gguf", "blk.0.attn_q.weight", a, b, alpha=8, architecture="qwen2"
        ),
        "a model": random_gguf,
    }
    (tmp_path / "text.gguf").write_text("hello")
    session = load(random_gguf)
    tokens = session.tokenize("some words")
    before = session.score(tokens)
    for path in [*wrong.values(), tmp_path / "text.gguf"]:
        with pytest.raises(ModelError, match=path.name):
            session.set_adapters([AdapterScale(path)])
    np.testing.assert_array_equal(session.score(tokens), before)


# --- Loading ---------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 3, 20, 500, 5000, -1000])
def test_a_file_cut_short_is_a_model_error(load: Any, random_gguf: Path, tmp_path: Path, kept: int) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(random_gguf.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"cut\.gguf"):
        load(cut)


def test_a_damaged_file_never_ends_the_process(runtime: Any, random_gguf: Path, tmp_path: Path) -> None:
    """Header bytes overwritten at random; each file either loads or is refused."""
    code = """
import sys
from pathlib import Path
from edgeft import plugins
from edgeft.artifact import Artifact
from edgeft.errors import ModelError
runtime = plugins.load("runtimes", sys.argv[1])
for file in sorted(Path(sys.argv[2]).glob("*.gguf")):
    print(file.name, flush=True)
    try:
        with runtime.load(Artifact(file), plugins.LoadOptions(context=256, threads=1, threads_batch=1)) as session:
            session.score(session.tokenize("hello"))
    except ModelError:
        pass
print("all", flush=True)
"""
    whole, random = random_gguf.read_bytes(), np.random.default_rng(0)
    for number in range(60):
        damaged = bytearray(whole)
        for at in random.integers(4, 6000, 4):
            damaged[at] = random.integers(256)
        (tmp_path / f"{number:03}.gguf").write_bytes(damaged)
    result = subprocess.run(
        [sys.executable, "-c", code, runtime.name, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert result.stdout.endswith("all\n"), f"{result.returncode}: {result.stdout[-20:]}{result.stderr[-2000:]}"


def test_a_context_that_fits_no_memory_is_a_model_error(load: Any, random_gguf: Path) -> None:
    with pytest.raises(ModelError, match=r"a context of 20000000000 tokens .*random.gguf takes 5120.0 GB"):
        load(random_gguf, context=20_000_000_000)


def test_memory_is_bounded_by_the_container(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    assert available_bytes(tmp_path / "meminfo", tmp_path) == 8000 * 1024
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(tmp_path / "meminfo", tmp_path) == 8000 * 1024
    (tmp_path / "memory.max").write_text("5000\n")
    assert available_bytes(tmp_path / "meminfo", tmp_path) == 4000
    assert available_bytes(tmp_path / "elsewhere", tmp_path / "elsewhere") is None


def test_closing_gives_the_memory_back(load: Any, random_gguf: Path) -> None:
    def resident_kb() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4

    def once() -> None:
        session = load(random_gguf)
        session.score(session.tokenize("x" * 500))
        session.close()

    for _ in range(5):
        once()
    before = resident_kb()
    for _ in range(20):
        once()
    assert resident_kb() - before < 20_000


def test_a_missing_file_is_named(load: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere\.gguf"):
        load(tmp_path / "nowhere.gguf")


def test_only_gguf_files_are_supported(runtime: Any, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(struct.pack("<4sI", b"ONNX", 3))
    support = runtime.supports(Artifact(tmp_path / "model.onnx"))
    assert not support.ok and "model.onnx" in support.reason and support.install is None


# --- The library -----------------------------------------------------------------------


def test_a_library_without_the_functions_is_refused() -> None:
    import _ctypes

    with pytest.raises(PluginError, match="it has no llama_"):
        llama_api.Library(Path(_ctypes.__file__))


def test_a_library_whose_structures_moved_is_refused(runtime: Any) -> None:
    """One field more at the front, as a newer release may have, and every default is somewhere else."""
    real = llama_api.open_library(runtime.find_library())

    def shifted() -> llama_api.ContextParams:
        params = real.llama_context_default_params()
        return llama_api.ContextParams.from_buffer_copy(b"\0" * 4 + bytes(params)[:-4])

    moved = SimpleNamespace(
        path=real.path,
        llama_model_default_params=real.llama_model_default_params,
        llama_context_default_params=shifted,
    )
    with pytest.raises(PluginError, match="n_ctx is 0, not 512"):
        llama_api._check_layout(moved)
    llama_api._check_layout(real)


def test_llama_cpp_writes_nothing_itself(runtime: Any, random_gguf: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(random_gguf.read_bytes()[:3000])
    code = """
import sys
from pathlib import Path
from edgeft import plugins
from edgeft.artifact import Artifact
runtime = plugins.load("runtimes", sys.argv[1])
try:
    runtime.load(Artifact(Path(sys.argv[3])), plugins.LoadOptions())
except plugins.PluginError.__bases__[0]:
    pass
with runtime.load(Artifact(Path(sys.argv[2])), plugins.LoadOptions()) as session:
    session.score(session.tokenize("hello"))
"""
    command = [sys.executable, "-c", code, runtime.name, str(random_gguf), str(cut)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout + result.stderr == ""
