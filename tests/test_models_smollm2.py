"""The model that needs no hub: pulled from a package, imported for training."""

import json
from pathlib import Path

import pytest

from edgeft.models import ALIASES, weights_digest
from edgeft.models.gguf_header import read_header
from edgeft.models.store import read_sidecar
from edgeft.paths import sha256_file

pytestmark = pytest.mark.model

TEXTS = [
    "Set the heating to 21.5 degrees at 2026-11-23 07:05.",
    "1234567890 １２３ ٣٤٥ ½ x² 3rd",
    "  two  spaces\n\n\ttab\r\n trailing  ",
    "it's we'll THEY'RE don't",
    "naïve café — “quotes” … 日本語のテキスト и русский עברית हिन्दी",
    "👩🏽‍💻🇩🇪 emoji\u200d\ufeff",
    "def f(x):\n    return {'a': x[0:10]}  # 100%\n",
    "<|im_start|>user\nhi 5<|im_end|>\n<|endoftext|>",
    "",
    " ",
]


def test_the_pulled_file_is_the_known_one(smollm2_gguf: Path) -> None:
    assert sha256_file(smollm2_gguf) == ALIASES["smollm2-135m"].sha256
    assert read_sidecar(smollm2_gguf.parent)["licence"] == "Apache-2.0"


def test_the_imported_directory_says_where_it_comes_from(smollm2_hf: Path, smollm2_gguf: Path) -> None:
    sidecar = read_sidecar(smollm2_hf)
    assert sidecar["imported_from"] == smollm2_gguf.name
    assert sidecar["sha256"] == ALIASES["smollm2-135m"].sha256
    assert sidecar["licence"] == "Apache-2.0"
    assert sidecar["tokenizer_pre"] == "smollm"
    assert len(weights_digest(smollm2_hf)) == 64


def test_nothing_of_the_machine_is_left_in_the_files(smollm2_hf: Path, smollm2_gguf: Path) -> None:
    for file in smollm2_hf.glob("*.json*"):
        assert str(smollm2_gguf.parent) not in file.read_text()
    config = json.loads((smollm2_hf / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["tie_word_embeddings"] is True


def test_the_chat_template_survives_byte_for_byte(smollm2_hf: Path, smollm2_gguf: Path) -> None:
    template = read_header(smollm2_gguf).chat_template
    assert template and (smollm2_hf / "chat_template.jinja").read_bytes() == template.encode()


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_the_imported_tokenizer_gives_llama_cpps_tokens(smollm2_hf: Path, llama_vocabulary, text: str) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(smollm2_hf / "tokenizer.json"))
    assert tokenizer.encode(text, add_special_tokens=False).ids == llama_vocabulary(text)


@pytest.fixture(scope="module")
def llama_vocabulary(smollm2_gguf: Path):
    """llama.cpp's own tokenizer, reading the vocabulary only."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(str(smollm2_gguf), vocab_only=True, verbose=False)
    yield lambda text: model.tokenize(text.encode(), add_bos=False, special=True)
    model.close()


def test_special_tokens_survive(smollm2_hf: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_hf)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer("hi")["input_ids"] == tokenizer("hi", add_special_tokens=False)["input_ids"]
    assert tokenizer.model_max_length == 8192
    assert tokenizer("2026")["input_ids"] != tokenizer("2 0 2 6")["input_ids"]
    assert len(tokenizer("2026")["input_ids"]) == 4


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("model.embed_tokens", "token_embd.weight"),
        ("model.layers.3.self_attn.q_proj", "blk.3.attn_q.weight"),
        ("model.layers.7.mlp.up_proj", "blk.7.ffn_up.weight"),
    ],
)
def test_weights_are_the_dequantized_ones(smollm2_hf: Path, smollm2_gguf: Path, name: str, own: str) -> None:
    import gguf
    import torch
    from safetensors import safe_open

    (tensor,) = (item for item in gguf.GGUFReader(smollm2_gguf).tensors if item.name == own)
    expected = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    if "q_proj" in name:
        # llama.cpp interleaves the two halves of each head of 64.
        expected = expected.view(9, 32, 2, 576).transpose(1, 2).reshape(576, 576)
    with safe_open(smollm2_hf / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor(f"{name}.weight"), expected.bfloat16())
