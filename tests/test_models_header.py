"""The header reader tells what a GGUF is, and refuses damaged files with a message instead of a crash."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from edgeft.errors import ModelError
from edgeft.models.gguf_header import TENSOR_TYPES, read_header


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_chat_template("{{ messages }}")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([f"token{i}" for i in range(100)])
    writer.add_tensor("norm.weight", np.ones(64, np.float32))
    data = gguf.quants.quantize(np.ones((8, 64), np.float32), gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("a.weight", data, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_it_reads_what_the_file_is(small: Path) -> None:
    header = read_header(small)
    assert (header.architecture, header.context_length, header.tokenizer_pre) == ("llama", 128, "smollm")
    assert header.chat_template == "{{ messages }}"
    assert header.parameters == 8 * 64 + 64
    assert header.type_mix == {"Q4_0": 512, "F32": 64}
    assert header.bits_per_weight == pytest.approx(8 * (512 / 32 * 18 + 256) / 576)


def test_it_agrees_with_the_gguf_package(small: Path) -> None:
    header, reference = read_header(small), gguf.GGUFReader(small)
    assert [(t.name, t.type, t.bytes, list(t.shape)) for t in header.tensors] == [
        (t.name, t.tensor_type.name, t.n_bytes, t.shape.tolist()) for t in reference.tensors
    ]
    assert header.data_offset == reference.data_offset
    assert header.metadata["tokenizer.ggml.tokens"] == [f"token{i}" for i in range(100)]


def test_block_sizes_are_ggmls() -> None:
    known = {kind.value: (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert {number: known[number] for number in TENSOR_TYPES if number in known} == dict(TENSOR_TYPES)


def test_every_truncation_is_refused(small: Path, tmp_path: Path) -> None:
    content = small.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 400, 7), *range(400, len(content), 97), len(content) - 32]:
        cut.write_bytes(content[:length])
        with pytest.raises(ModelError) as caught:
            read_header(cut)
        assert str(cut) in caught.value.message


def test_random_damage_never_crashes(small: Path, tmp_path: Path) -> None:
    content, random, bad = small.read_bytes(), np.random.default_rng(0), tmp_path / "bad.gguf"
    for _ in range(300):
        damaged = bytearray(content)
        for position in random.integers(4, 1500, 8):
            damaged[position] = random.integers(256)
        bad.write_bytes(damaged)
        try:
            header = read_header(bad)
            _ = [header.metadata[key] for key in header.metadata], header.bits_per_weight
        except ModelError:
            pass


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\3\4 not a model", b"GGUF" + struct.pack("<IQQ", 1, 0, 0)])
def test_other_files_are_named_as_such(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError):
        read_header(path)


def test_an_announced_count_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60))
    with pytest.raises(ModelError, match="announces"):
        read_header(path)
