"""Without an adapter, an export is what llama.cpp's converter and quantizer make, byte for byte."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import parity_cases as parity
import pytest
import reference
import tiny_families
from parity_cases import Case, Exported
from reference import FILE_TYPES, Job, Reference
from tiny_families import FamilyCase

from edgeft import plugins
from edgeft.artifact import Artifact
from edgeft.plugins import LoadOptions
from edgeft.verify.corpus import texts

pytestmark = pytest.mark.reference


@pytest.fixture(scope="module")
def llama_cpp(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    worker = Reference(reference.converter_source(cache), tmp_path_factory.mktemp("reference") / "log.txt")
    yield worker
    worker.close()


def tokenizer_of(case: Case, cache: Path, smollm2: Path) -> Path:
    return smollm2 if case.tokenizer == "smollm2" else reference.tokenizer_files(cache, case.tokenizer)


@pytest.fixture(scope="module", params=parity.TESTED, ids=lambda case: case.label)
def exported(
    request: pytest.FixtureRequest,
    cache: Path,
    smollm2_hf: Path,
    llama_cpp: Reference,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Exported]:
    folder = tmp_path_factory.mktemp("case")
    yield parity.prepare(request.param, folder, tokenizer_of(request.param, cache, smollm2_hf), llama_cpp)
    # Cases of some hundred megabytes would pile up.
    shutil.rmtree(folder)


@pytest.mark.parametrize("target", FILE_TYPES)
def test_every_tensor_is_byte_identical(exported: Exported, target: str) -> None:
    ours, theirs = (reference.read_gguf(file) for file in (exported.ours(target), exported.theirs(target)))
    assert parity.different_tensors(ours, theirs) == []
    assert list(parity.unexplained(ours, theirs)) == []


@pytest.mark.parametrize("case", tiny_families.CONVERTED, ids=lambda case: case.label)
def test_every_family_is_byte_identical(case: FamilyCase, llama_cpp: Reference, tmp_path: Path) -> None:
    exported = parity.prepare_family(case, tmp_path, llama_cpp)
    for target in FILE_TYPES:
        ours, theirs = (reference.read_gguf(file) for file in (exported.ours(target), exported.theirs(target)))
        assert parity.different_tensors(ours, theirs) == [], target
        assert list(parity.unexplained(ours, theirs)) == [], target


@pytest.mark.parametrize("tokenizer", reference.ROWS)
def test_runtimes_read_text_as_the_tokenizer_does(
    tokenizer: str, cache: Path, smollm2_hf: Path, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer

    case = Case(tokenizer, parity.ODD)
    model = reference.build_model(tmp_path / "model", tokenizer, tokenizer_of(case, cache, smollm2_hf), case.shape)
    file = parity.export(model, "gguf-q8_0", tmp_path / "model.gguf")
    expected = Tokenizer.from_file(str(model / "tokenizer.json"))
    for runtime in ("llama-cpp-python", "xllamacpp"):
        with plugins.load("runtimes", runtime).load(Artifact(file), LoadOptions()) as session:
            different = [
                text
                for _, text in texts()
                # SentencePiece's own mark for a space, written out, is a space to llama.cpp.
                if not (tokenizer == "gemma3" and "▁▁" in text)
                and session.tokenize(text, special=True) != expected.encode(text, add_special_tokens=False).ids
            ]
        assert different == [], runtime


def different_texts(vocabulary: Any, expected: Any) -> set[str]:
    """Texts of the corpus that llama.cpp turns into other tokens; special tokens are read as such, as in chats."""
    return {
        text
        for _, text in texts()
        if vocabulary.tokenize(text.encode(), add_bos=False, special=True)
        != expected.encode(text, add_special_tokens=False).ids
    }


def load_vocabulary(file: Path) -> Any:
    import llama_cpp

    return llama_cpp.Llama(str(file), vocab_only=True, verbose=False)


# --- With an adapter ----------------------------------------------------------


MERGED = [case for case in tiny_families.CONVERTED if case.shape.hidden == 256 and not case.variant]


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma3"])
def test_merging_on_the_way_gives_what_merging_first_gives(family: str, llama_cpp: Reference, tmp_path: Path) -> None:
    case = next(case for case in MERGED if case.family == family)
    base = tiny_families.build(tmp_path / "base", case)
    adapter, merged = parity.add_adapter(base, tmp_path / "merged")
    parity.convert_and_quantize(merged, tmp_path, llama_cpp, pre="smollm")
    for target in FILE_TYPES:
        file = parity.export(base, target, tmp_path / f"ours-{target}.gguf", adapter, "bf16")
        ours, theirs = (reference.read_gguf(path) for path in (file, tmp_path / f"theirs-{target}.gguf"))
        differing, total = parity.differing_blocks(ours, theirs)
        # Float32 sums in another order, rounded to bfloat16: now and then a weight falls on the other side.
        assert differing / total < 0.01, f"{target}: {differing} of {total} blocks"
        changed = {name for name in parity.different_tensors(ours, theirs) if not name.startswith("blk.")}
        assert changed == set()
        plain = reference.read_gguf(parity.export(base, target, tmp_path / f"plain-{target}.gguf"))
        linear, all_ = parity.differing_blocks(ours, plain)
        assert linear / all_ > 0.5, "the adapter must change most of what it reaches"


# --- Where llama.cpp is wrong -------------------------------------------------


@pytest.fixture
def qwen(cache: Path, tmp_path: Path) -> Path:
    source = reference.tokenizer_files(cache, "qwen3")
    return reference.build_model(tmp_path / "qwen", "qwen3", source, parity.NARROW)


def their_metadata(model: Path, llama_cpp: Reference) -> dict[str, Any]:
    file = model.with_suffix(".gguf")
    llama_cpp.run(Job(str(model), str(file), vocab_only=True))
    return {key: value for key, (_, value) in reference.read_gguf(file).metadata.items()}


def our_metadata(model: Path) -> dict[str, Any]:
    from edgeft.converters.gguf_metadata import metadata

    return {pair.key: pair.value for pair in metadata(model, json.loads((model / "config.json").read_text()))}


def test_llama_cpp_prefers_a_stale_template(qwen: Path, llama_cpp: Reference) -> None:
    (qwen / "chat_template.jinja").write_text("fresh")
    assert our_metadata(qwen)["tokenizer.chat_template"] == "fresh"
    assert their_metadata(qwen, llama_cpp)["tokenizer.chat_template"] != "fresh"


def test_llama_cpp_forgets_stop_tokens_of_the_generation_config(qwen: Path, llama_cpp: Reference) -> None:
    (qwen / "generation_config.json").write_text(json.dumps({"eos_token_id": [151645, 151658]}))
    assert our_metadata(qwen)["tokenizer.ggml.eot_token_id"] == 151658
    assert "tokenizer.ggml.eot_token_id" not in their_metadata(qwen, llama_cpp)


def test_stop_tokens_end_generation_in_llama_cpp(qwen: Path, tmp_path: Path) -> None:
    import llama_cpp

    (qwen / "generation_config.json").write_text(json.dumps({"eos_token_id": [151645, 151643, 151658, 151657]}))
    vocabulary = load_vocabulary(parity.export(qwen, "gguf-q8_0", tmp_path / "q.gguf"))
    ends = [llama_cpp.llama_vocab_is_eog(vocabulary._model.vocab, id_) for id_ in (151645, 151643, 151658, 151657)]
    assert all(ends)
    assert not llama_cpp.llama_vocab_is_eog(vocabulary._model.vocab, 128247)


def test_llama_cpp_merges_in_any_order_without_tokenizer_model(
    cache: Path, llama_cpp: Reference, tmp_path: Path
) -> None:
    """Its own conversion of a SentencePiece tokenizer.json reads texts otherwise; ours reads all as they should be."""
    from tokenizers import Tokenizer

    source = reference.tokenizer_files(cache, "llama2")
    model = reference.build_model(tmp_path / "model", "llama2", source, parity.NARROW)
    llama_cpp.run(Job(str(model), str(tmp_path / "theirs.gguf")))
    ours = load_vocabulary(parity.export(model, "gguf-q8_0", tmp_path / "ours.gguf"))
    theirs = load_vocabulary(tmp_path / "theirs.gguf")
    expected = Tokenizer.from_file(str(source / "tokenizer.json"))
    assert different_texts(ours, expected) == set()
    assert len(different_texts(theirs, expected)) > 5


def test_llama_cpp_does_not_know_a_tokenizer_with_one_more_token(qwen: Path, cache: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(qwen)
    # A piece of the string that llama.cpp's converter hashes the tokens of.
    tokenizer.add_tokens(["apple工作"])
    tokenizer.save_pretrained(qwen)
    ours = our_metadata(qwen)
    assert ours["tokenizer.ggml.pre"] == "qwen2"
    assert ours["tokenizer.ggml.tokens"][151669] == "apple工作"
    worker = Reference(reference.converter_source(cache), tmp_path / "log.txt")
    try:
        with pytest.raises(reference.ReferenceMissing, match="pre-tokenizer was not recognized"):
            their_metadata(qwen, worker)
    finally:
        worker.close()
