"""Training computes what a plain implementation computes: packed or apart, fused or not, in chunks or at once."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_families
import torch

from edgeft.data.example import Encoded
from edgeft.errors import UnsupportedModel
from edgeft.train import attention, batch, cross_entropy, fused
from edgeft.train.evaluation import evaluate

KINDS = ("llama", "mistral", "qwen2", "qwen3")


def examples(lengths: Sequence[int], vocabulary: int = tiny.TOKENS, seed: int = 0) -> list[Encoded]:
    generator = random.Random(seed)
    made = []
    for length in lengths:
        tokens = [generator.randrange(vocabulary) for _ in range(length)]
        made.append(Encoded(tokens, [place >= length // 2 for place in range(length)]))
    return made


def load(folder: Path, implementation: str = attention.NAME) -> Any:
    from transformers import AutoModelForCausalLM

    attention.register()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=implementation)
    attention.install(model)
    return model


def plain_nll(model: Any, example: Encoded) -> torch.Tensor:
    """Transformers' own forward on one example, and torch's cross-entropy."""
    tokens = torch.tensor([example.tokens])
    labels = torch.where(torch.tensor(example.learned), tokens[0], -100)[1:]
    logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_see_only_themselves(kind: str, tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path, kind, max_position_embeddings=1024)
    apart, packed = load(folder, "eager"), load(folder)
    documents = examples([17, 40, 3, 39, 300, 16])
    expected = sum(plain_nll(apart, example) for example in documents)
    assert batch.batch_nll(packed, batch.collate(documents)).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("case", tiny_families.COMPUTED, ids=lambda case: case.label)
def test_every_family_attends_as_transformers_does(case: tiny_families.FamilyCase, tmp_path: Path) -> None:
    folder = tiny_families.build(tmp_path, case, spread=0.2)
    apart, packed = load(folder, "eager"), load(folder)
    # All of them longer than 64 tokens, where longrope changes its factors: one set applies to a whole row.
    documents = examples([70, 90, 300], vocabulary=64)
    expected = sum(plain_nll(apart, example) for example in documents)
    assert batch.batch_nll(packed, batch.collate(documents)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_model_that_would_mix_documents_is_refused(tmp_path: Path) -> None:
    model = load(tiny.write_model(tmp_path), "sdpa")
    with pytest.raises(UnsupportedModel, match="does not keep documents apart"):
        batch.batch_nll(model, batch.collate(examples([20, 20])))


def test_hidden_states_of_packed_documents_equal_those_of_separate_ones(tmp_path: Path) -> None:
    model = load(tiny.write_model(tmp_path))
    documents = examples([12, 31, 30])
    packed = batch.collate(documents)
    together = model.base_model(
        input_ids=packed["input_ids"],
        position_ids=packed["position_ids"],
        documents=packed["documents"],
        use_cache=False,
    ).last_hidden_state[0]
    apart = [
        model.base_model(input_ids=torch.tensor([e.tokens]), use_cache=False).last_hidden_state[0] for e in documents
    ]
    expected = torch.cat(apart)
    torch.testing.assert_close(together[: len(expected)], expected, rtol=1e-5, atol=1e-6)


def test_another_document_in_the_pack_changes_nothing(tmp_path: Path) -> None:
    model = load(tiny.write_model(tmp_path))
    first, *others = examples([20, 20, 20])
    for other in others:
        packed = batch.collate([first, other])
        inputs = {key: packed[key] for key in ("input_ids", "position_ids", "documents")}
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state[0, :20]
        if other is others[0]:
            expected = hidden
    torch.testing.assert_close(hidden, expected, rtol=0, atol=0)


def test_a_sliding_window_is_respected(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path, "mistral", sliding_window=8)
    document = examples([40])
    expected = plain_nll(load(folder, "eager"), document[0])
    assert batch.batch_nll(load(folder), batch.collate(document)).item() == pytest.approx(expected.item(), rel=1e-6)


def with_prefix(lengths: Sequence[int], prefix: int) -> list[Encoded]:
    """Examples of these lengths, the first tokens of which are the same and not learned."""
    head = examples([prefix], seed=1)[0].tokens
    rest = examples([length - prefix for length in lengths])
    return [Encoded(head + one.tokens, [False] * prefix + one.learned) for one in rest]


PREFIXED = {
    "llama": {"max_position_embeddings": 1024},
    "qwen3": {},
    "mistral": {"sliding_window": 8},
    "mistral-wide": {"sliding_window": 35},
}


@pytest.mark.parametrize("kind", PREFIXED)
def test_a_shared_prefix_changes_neither_loss_nor_gradients(kind: str, tmp_path: Path) -> None:
    from peft import PeftModel

    base = tiny.write_model(tmp_path / "base", kind.partition("-")[0], **PREFIXED[kind])
    tiny.write_adapter(base, tmp_path / "adapter", target_modules="all-linear")
    documents = with_prefix([30, 47, 28, 29, *([320] if kind == "llama" else [])], 19)
    assert batch.shared_prefix(documents[:4]) == 19
    plain = PeftModel.from_pretrained(load(base, "eager"), tmp_path / "adapter", is_trainable=True)
    fast = PeftModel.from_pretrained(load(base), tmp_path / "adapter", is_trainable=True)
    expected: Any = sum(plain_nll(plain, example) for example in documents)
    expected.backward()
    packed = batch.collate(documents, 19)
    assert int((packed["position_ids"] == 20).sum()) == len(documents) > int((packed["position_ids"] == 18).sum()) == 1
    got = batch.batch_nll(fast, packed)
    got.backward()
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)
    theirs = dict(plain.named_parameters())
    for name, parameter in fast.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-5)


def test_only_what_no_example_learns_is_shared() -> None:
    same = with_prefix([30, 40, 50], 12)
    assert batch.shared_prefix(same) == 12
    learning = Encoded(same[0].tokens, [False] * 5 + [True] * 25)
    assert batch.shared_prefix([*same, learning]) == 4  # the token before the first learned one predicts it
    assert batch.shared_prefix(with_prefix([30, 40, 500], 12)) == 0  # not worth it
    assert batch.shared_prefix(same[:1]) == 0
    whole = Encoded(same[0].tokens[:12], [False] * 12)
    assert batch.shared_prefix([*same, whole]) == 11  # every document keeps a token of its own


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"lora_alpha": 3, "r": 2}, {"use_dora": True}])
def test_gradients_through_fused_layers_are_pefts(settings: dict[str, Any], tmp_path: Path) -> None:
    from peft import PeftModel

    base = tiny.write_model(tmp_path / "base")
    tiny.write_adapter(base, tmp_path / "adapter", **{"target_modules": "all-linear", **settings})
    documents = examples([30, 9, 28])
    plain = PeftModel.from_pretrained(load(base, "eager"), tmp_path / "adapter", is_trainable=True)
    fast = PeftModel.from_pretrained(load(base), tmp_path / "adapter", is_trainable=True)
    counts = fused.install(fast)
    assert counts["norm"] == 5
    assert counts["mlp"] == 2
    assert counts["adapter"] == (0 if settings.get("use_dora") else 14)
    expected: Any = sum(plain_nll(plain, example) for example in documents)
    expected.backward()
    got = batch.batch_nll(fast, batch.collate(documents))
    got.backward()
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)
    theirs = dict(plain.named_parameters())
    for name, parameter in fast.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-5)


def test_adapter_dropout_is_applied_in_training_only(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        load(tiny.write_model(tmp_path)), LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear")
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    fused.install(model)
    packed = batch.collate(examples([30]))
    model.train()
    assert batch.batch_nll(model, packed).item() != batch.batch_nll(model, packed).item()
    model.eval()
    assert batch.batch_nll(model, packed).item() == batch.batch_nll(model, packed).item()


@pytest.mark.parametrize("with_bias", [False, True])
def test_chunked_cross_entropy_is_the_plain_one(with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * 301 * 7)  # chunks of 7 rows, the last one smaller
    torch.manual_seed(0)
    hidden = torch.randn(50, 16, requires_grad=True)
    weight = torch.randn(301, 16, requires_grad=True)
    bias = torch.randn(301) if with_bias else None
    targets = torch.randint(0, 301, (50,))
    expected = torch.nn.functional.cross_entropy(
        hidden @ weight.t() + (0 if bias is None else bias), targets, reduction="sum"
    )
    wanted = torch.autograd.grad(expected / 50, (hidden, weight))
    got = cross_entropy.summed_nll(hidden, weight, bias, targets)
    grads = torch.autograd.grad(got / 50, (hidden, weight))
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)
    for mine, theirs in zip(grads, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4)
    cross_entropy.summed_nll(hidden, weight, None, torch.arange(5)).backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_large_logits_do_not_overflow() -> None:
    hidden, weight = torch.full((1, 1), 1000.0), torch.tensor([[1.0], [-1.0]])
    assert cross_entropy.summed_nll(hidden, weight, None, torch.tensor([0])).item() == 0.0


def test_evaluation_counts_learned_tokens_once(tmp_path: Path) -> None:
    model = load(tiny.write_model(tmp_path))
    documents = examples([30, 12, 25, 40])
    result = evaluate(model, documents, micro_tokens=64, autocast=None)
    assert result.tokens == sum(sum(example.learned) for example in documents)
    expected = sum(plain_nll(model, example).item() for example in documents) / result.tokens
    assert result.nll == pytest.approx(expected, rel=1e-6)


def test_the_first_token_of_a_text_is_not_scored() -> None:
    text = Encoded([5, 6, 7], [True, True, True])
    assert batch.learned_count(text) == 2
    assert batch.collate([text])["targets"].tolist() == [6, 7]
