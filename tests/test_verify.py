"""`edgeft verify` accepts a faithful file and refuses every kind of unfaithful one; all parts are real, but tiny."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from tiny import write_loadable as write_base

from edgeft.artifact import read_manifest
from edgeft.cli.main import main
from edgeft.data.example import Encoded, Example
from edgeft.errors import CheckFailed, ModelError, UsageError
from edgeft.models import weights_digest
from edgeft.models.gguf_header import read_header
from edgeft.plugins import LoadOptions, Session, Source
from edgeft.run import Run, RunManifest
from edgeft.sessions import open_session
from edgeft.verify.build_steps import Parts
from edgeft.verify.check import check_adapter, encode_for, verify_file
from edgeft.verify.divergence import ROWS, Divergence, chunks, scored_rows
from edgeft.verify.quick import quick_check
from edgeft.verify.report import Finding, Report, tolerance_for
from edgeft.verify.torch_reference import load_reference

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and two thread pools that wait for each other lose much."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


ROOMS = ("kitchen", "attic", "hall", "garage", "study", "cellar")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base/, adapter/, other/ (another adapter) and data.jsonl, data that all goes to one split."""
    folder = tmp_path_factory.mktemp("verify")
    write_base(folder / "base")
    for name, seed in (("adapter", 1), ("other", 2)):
        # A large scale: what a short random adapter does to a random model could hardly be measured.
        settings = {"target_modules": ["q_proj", "v_proj", "down_proj"], "lora_alpha": 800}
        tiny.write_adapter(folder / "base", folder / name, seed=seed, **settings)
    (folder / "data").mkdir()
    lines = (json.dumps({"messages": chat(room)}) for room in ROOMS)
    (folder / "data" / "test.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def chat(room: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"light in the {room} to 40"},
        {"role": "assistant", "content": json.dumps({"room": room, "value": 40})},
    ]


EXAMPLES = [Example(tuple(chat(room))) for room in ROOMS]


@pytest.fixture(scope="module")
def export(parts: Path) -> Callable[..., Path]:
    made: dict[tuple[str, ...], Path] = {}

    def run(base: str = "base", adapter: str | None = "adapter", target: str = "gguf-f16") -> Path:
        key = (base, str(adapter), target)
        if key not in made:
            made[key] = parts / f"{'-'.join(key)}.gguf"
            extra = ["--adapter", str(parts / adapter)] if adapter else []
            command = ["export", str(parts / base), *extra, "--to", target, "--out", str(made[key]), "--no-verify"]
            assert main(command) == 0
        return made[key]

    return run


@pytest.fixture
def opened() -> Iterator[Callable[[Path], Session]]:
    sessions: list[Session] = []

    def load(file: Path) -> Session:
        # The prebuilt runtime: a compiled one may use instructions that round differently.
        sessions.append(open_session(str(file), "xllamacpp", LoadOptions(threads=1, threads_batch=1)).session)
        return sessions[-1]

    yield load
    for session in sessions:
        session.close()


@pytest.fixture
def verified(parts: Path, opened: Callable[[Path], Session]) -> Callable[..., Report]:
    def run(file: Path, base: str = "base", adapter: str | None = "adapter", **options: Any) -> Report:
        source = Source(parts / base, parts / adapter if adapter else None, chat_template=options.pop("template", None))
        return verify_file(Parts(source, file, opened(file)), EXAMPLES, **options)

    return run


def failed(report: Report) -> set[str]:
    return {finding.name for finding in report.failed}


# --- faithful files -------------------------------------------------------------


@pytest.mark.parametrize("target", ["gguf-f16", "gguf-bf16", "gguf-q8_0"])
def test_a_faithful_file_passes(export: Callable[..., Path], verified: Callable[..., Report], target: str) -> None:
    report = verified(export(target=target))
    assert report.ok, report.failed
    assert {finding.name for finding in report.findings} == {
        "tokenizer", "template", "prompt", "kl", "top1", "nll", "adapter",
    }  # fmt: skip
    assert report.figures["nll_file"] == pytest.approx(report.figures["nll_merged"], abs=0.02)
    assert report.figures["examples"] == len(EXAMPLES)


def test_sixteen_bits_are_nearer_than_eight(export: Callable[..., Path], verified: Callable[..., Report]) -> None:
    sixteen, eight = (verified(export(target=target)).figures["kl"] for target in ("gguf-f16", "gguf-q8_0"))
    assert sixteen is not None and eight is not None
    assert 0 <= sixteen < eight / 5


def test_a_model_without_adapter_is_verified_too(export: Callable[..., Path], verified: Callable[..., Report]) -> None:
    report = verified(export(adapter=None), adapter=None)
    assert report.ok and "adapter" not in {finding.name for finding in report.findings}


# --- unfaithful files -----------------------------------------------------------


def test_a_file_that_lost_the_adapter_is_found(export: Callable[..., Path], verified: Callable[..., Report]) -> None:
    report = verified(export(adapter=None))
    assert "adapter" in failed(report)
    (finding,) = (finding for finding in report.findings if finding.name == "adapter")
    assert "nearer to the base" in finding.detail


def test_a_lost_adapter_is_found_whatever_the_tolerance(
    export: Callable[..., Path], verified: Callable[..., Report]
) -> None:
    report = verified(export(adapter=None), tolerance={"kl": 99.0, "top1": 0.0, "nll": 99.0})
    assert failed(report) == {"adapter"}


def test_another_adapter_is_found(export: Callable[..., Path], verified: Callable[..., Report]) -> None:
    assert "kl" in failed(verified(export(adapter="other")))


def test_another_template_is_found(export: Callable[..., Path], verified: Callable[..., Report]) -> None:
    report = verified(export(), template=tiny.TEMPLATE.replace("\\n", " ").replace("\n", ""))
    assert {"template", "prompt"} <= failed(report)


def test_another_tokenizer_is_found(parts: Path, export: Callable[..., Path], verified: Callable[..., Report]) -> None:
    """Two letters swapped in the vocabulary: every length is right, and every prompt wrong."""
    file = export()
    swapped = Path(shutil.copytree(parts / "base", parts / "swapped", dirs_exist_ok=True)) / "tokenizer.json"
    document = json.loads(swapped.read_text())
    vocabulary = document["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    swapped.write_text(json.dumps(document))
    report = verified(file, base="swapped")
    assert "tokenizer" in failed(report)
    assert "parts at token" in next(f.detail for f in report.findings if f.name == "tokenizer")


def test_a_tokenizer_that_keeps_numbers_whole_is_found(parts: Path, export: Callable[..., Path]) -> None:
    """Losing the rule that splits digits is what a careless conversion does."""
    from edgeft.models.text import load_text_side
    from edgeft.verify.corpus import texts
    from edgeft.verify.tokenizers import check_tokenizer

    folder = Path(shutil.copytree(parts / "base", parts / "whole-numbers", dirs_exist_ok=True))
    document = json.loads((folder / "tokenizer.json").read_text())
    right = load_text_side(folder).tokenize
    document["pre_tokenizer"] = document["pre_tokenizer"]["pretokenizers"][1]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    wrong = load_text_side(folder).tokenize
    assert check_tokenizer(right, right, texts()).ok
    finding = check_tokenizer(right, wrong, texts())
    assert not finding.ok and "numbers" in finding.detail


def test_a_file_that_computes_nan_is_refused(
    parts: Path, export: Callable[..., Path], opened: Callable[[Path], Session], verified: Callable[..., Report]
) -> None:
    bad = damaged(export(), parts / "nan.gguf")
    with pytest.raises(CheckFailed, match="not finite"):
        verified(bad)
    findings = quick_check(bad, Source(parts / "base", parts / "adapter"), opened(bad))
    assert not next(finding for finding in findings if finding.name == "finite").ok


def damaged(file: Path, copy: Path) -> Path:
    """A copy whose last normalization is NaN."""
    header = read_header(file)
    (norm,) = (tensor for tensor in header.tensors if tensor.name == "output_norm.weight")
    content = bytearray(file.read_bytes())
    start = header.data_offset + norm.offset
    content[start : start + norm.bytes] = np.full(norm.elements, np.nan, np.float32).tobytes()
    copy.write_bytes(content)
    return copy


def test_an_adapter_of_another_model_is_said(parts: Path, export: Callable[..., Path]) -> None:
    write_base(parts / "wider", hidden_size=128)
    with pytest.raises(ModelError, match="does not go onto"):
        load_reference(parts / "wider", parts / "adapter")


# --- the pieces -----------------------------------------------------------------


def test_taking_the_adapter_out_and_in_again_changes_nothing(parts: Path) -> None:
    merged = load_reference(parts / "base", parts / "adapter")
    plain = load_reference(parts / "base", None)
    tokens, rows = list(range(40, 60)), [3, 4, 10]
    before = merged.log_probs(tokens, rows)
    with merged.without_adapter():
        np.testing.assert_allclose(merged.log_probs(tokens, rows), plain.log_probs(tokens, rows), atol=1e-5)
    np.testing.assert_allclose(merged.log_probs(tokens, rows), before, atol=1e-5)
    assert not np.allclose(before, plain.log_probs(tokens, rows), atol=1e-3)


def test_an_adapter_without_effect_is_not_called_lost(
    parts: Path, export: Callable[..., Path], opened: Callable[[Path], Session]
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(parts / "base", dtype=torch.float32)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(parts / "fresh")
    source = Source(parts / "base", parts / "fresh")
    reference = load_reference(source.base, source.adapter)
    finding, _ = check_adapter(reference, opened(export(adapter=None)), encode_for(source, EXAMPLES, 256))
    assert finding.ok and "hardly changes" in finding.detail


def test_divergence_is_the_textbooks() -> None:
    random = np.random.default_rng(0)

    def log_probs() -> Any:
        logits = random.normal(size=(5, 11))
        return (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)

    p, q, targets = log_probs(), log_probs(), np.asarray([0, 3, 5, 7, 10])
    total = Divergence()
    total.add(p[:2], q[:2], targets[:2])
    total.add(p[2:], q[2:], targets[2:])
    assert total.kl == pytest.approx((np.exp(p) * (p - q)).sum() / 5, rel=1e-5)
    assert total.nll_reference == pytest.approx(-p[np.arange(5), targets].mean(), rel=1e-5)
    assert total.nll_file == pytest.approx(-q[np.arange(5), targets].mean(), rel=1e-5)
    assert total.top1 == (p.argmax(1) == q.argmax(1)).mean()
    same = Divergence()
    same.add(p, p, targets)
    assert (same.kl, same.top1) == (0, 1)


@given(st.sets(st.integers(0, 2000), min_size=1))
def test_chunks_bound_what_is_held(rows: set[int]) -> None:
    ordered = sorted(rows)
    parted = list(chunks(ordered))
    assert [row for part in parted for row in part] == ordered
    assert all(part[-1] - part[0] < ROWS for part in parted)


def test_the_first_token_is_never_scored() -> None:
    assert scored_rows(Encoded([1, 2, 3], [True, False, True])) == [1]


def test_more_bits_mean_tighter_limits() -> None:
    limits = [tolerance_for(bits, 1.0) for bits in (16, 8.5, 6.2, 4.5, 2)]
    assert [limit.kl for limit in limits] == sorted(limit.kl for limit in limits)
    assert [limit.top1 for limit in limits] == sorted((limit.top1 for limit in limits), reverse=True)
    with pytest.raises(UsageError):
        limits[0].with_changes({"speed": 1.0})


def test_a_sure_model_has_tighter_limits() -> None:
    assert tolerance_for(4.5, 0.01).kl < tolerance_for(4.5, 3.0).kl


# --- the quick check ------------------------------------------------------------


def test_the_quick_check_compares_weights_where_torch_is(
    parts: Path, export: Callable[..., Path], opened: Callable[[Path], Session]
) -> None:
    source = Source(parts / "base", parts / "adapter")
    findings = quick_check(export(), source, opened(export()), examples=EXAMPLES)
    assert all(finding.ok for finding in findings), findings
    assert {"tokenizer", "template", "prompt", "finite", "kl", "adapter"} <= {finding.name for finding in findings}
    lost = quick_check(export(adapter=None), source, opened(export(adapter=None)))
    assert "adapter" in {finding.name for finding in lost if not finding.ok}


def test_the_quick_check_works_without_torch(parts: Path, export: Callable[..., Path]) -> None:
    code = (
        "import sys\n"
        "sys.modules.update(torch=None, transformers=None, peft=None)\n"
        "from pathlib import Path\n"
        "from edgeft.plugins import Source\n"
        "from edgeft.sessions import open_session\n"
        "from edgeft.verify.quick import quick_check\n"
        f"file = Path({str(export())!r})\n"
        f"source = Source(Path({str(parts / 'base')!r}), Path({str(parts / 'adapter')!r}))\n"
        "with open_session(str(file), 'xllamacpp').session as session:\n"
        "    for finding in quick_check(file, source, session):\n"
        "        print(finding.name, finding.ok, finding.skipped)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "tokenizer True False", "template True False", "prompt True False", "finite True False", "kl True True",
    ]  # fmt: skip


# --- the command ----------------------------------------------------------------


def write_run(parts: Path, folder: Path) -> Run:
    from edgeft.data.load import dataset_digest

    shutil.copytree(parts / "adapter", folder / "adapter")
    (folder / "config.toml").write_text("")
    run = Run(folder)
    base, data = parts / "base", parts / "data"
    run.write_manifest(
        RunManifest(
            method="qlora",
            base={"reference": str(base), "path": str(base), "digest": weights_digest(base)},
            data={"reference": str(data), "path": str(data), "digest": dataset_digest(data)},
            chat_template=tiny.TEMPLATE,
            seed=0,
            versions={},
            evaluation={"nll_training_graph": 5.5},
        )
    )
    return run


@pytest.fixture
def run(parts: Path, tmp_path: Path) -> Run:
    return write_run(parts, tmp_path / "run")


def test_the_ledger_goes_into_the_files_manifest(
    run: Run, export: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = export(target="gguf-q8_0")
    assert main(["verify", str(run.path), str(file), "--runtime", "xllamacpp", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ok"] is True and result["nll_training_graph"] == 5.5
    manifest = read_manifest(file)
    assert manifest is not None
    stages = ("nll_training_graph", "nll_merged", "nll_file")
    assert dict(manifest.ledger) == {stage: result[stage] for stage in stages}


def test_a_failed_check_prints_the_report_and_ends_with_5(
    run: Run, export: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(run.path), str(export(adapter=None)), "--runtime", "xllamacpp"]) == 5
    captured = capsys.readouterr()
    assert "FAILED" in captured.out and "nearer to the base" in captured.err


def test_limits_can_be_set(run: Run, export: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["verify", str(run.path), str(export(target="gguf-q8_0")), "--runtime", "xllamacpp", "--examples", "2"]
    assert main([*command, "--tolerance", "kl=0"]) == 5
    assert main([*command, "--tolerance", "speed=1"]) == 2
    assert main([*command, "--tolerance", "kl"]) == 2
    assert "NAME=VALUE" in capsys.readouterr().err


def test_a_model_needs_data_to_be_compared_on(
    parts: Path, export: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(parts / "base"), str(export(adapter=None))]) == 2
    assert "--data" in capsys.readouterr().err


def test_a_missing_file_is_said(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run.path), "nothing.gguf"]) != 0
    assert "nothing.gguf" in capsys.readouterr().err


def test_a_finding_that_was_skipped_is_no_failure() -> None:
    assert Report((Finding("kl", True, "torch is not installed", skipped=True),)).ok
