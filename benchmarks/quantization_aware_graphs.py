"""Files of runs, the graphs that were trained and those that files hold, and their losses on held-out examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from quantization_aware_data import MODEL

_PASS_TOKENS = 1024


def write(work: Path, run: Path, method: str, how: str) -> tuple[Path, int, Path | None]:
    """The file of a run, its bytes, and the base that it lies beside, if it is an adapter."""
    out, base, merge = work / "files" / f"{run.name}-{how}.gguf", None, None
    out.parent.mkdir(exist_ok=True)
    if how.startswith("unmerged-"):
        target = how.removeprefix("unmerged-")
        base = work / "files" / f"base-{target}.gguf"
        export(MODEL, f"gguf-{target}", base)
        export(str(run), "gguf-lora", out)
        return out, out.stat().st_size + base.stat().st_size, base
    if method == "qlora":
        merge, how = how.split("-", 1)
    export(str(run), f"gguf-{how}", out, merge)
    return out, out.stat().st_size, None


def export(model: str, target: str, out: Path, merge: str | None = None) -> None:
    from edgeft import export as workflow
    from edgeft.progress import Silent

    if not out.is_file():
        bases: dict[str | None, Any] = {None: None, "w16": "w16", "nf4": "nf4-roundtrip"}
        workflow.export(workflow.prepare(model, target, out=out, merge_base=bases[merge]), Silent())


def trained_graph(run: Path) -> Any:
    """What training computed with, in its own arithmetic."""
    import torch

    from edgeft.models import resolve
    from edgeft.models.packed import fill, read_packed
    from edgeft.train import read_config
    from edgeft.train.hardware import detect
    from edgeft.train.loading import load_base

    base, hardware, config = resolve(MODEL, want="hf").path, detect(), read_config(run)
    model = load_base(base, config, hardware)
    if (run / "packed").is_dir():
        with torch.no_grad():
            fill(model, read_packed(run / "packed"))
        return fused(model)
    return fused(model, run / "adapter")


def file_graph(file: Path, adapter: Path | None) -> Any:
    """The file's own values in the same arithmetic."""
    import torch

    from edgeft.models import resolve
    from edgeft.models.gguf_torch import load_packed
    from edgeft.train import attention

    attention.register()
    folder = resolve(MODEL, want="hf").path
    return fused(load_packed(file, folder, torch.bfloat16, attention=attention.NAME), adapter)


def fused(model: Any, adapter: Path | None = None) -> Any:
    from edgeft.train import fused as layers

    if adapter is not None:
        import peft

        model = peft.PeftModel.from_pretrained(model, str(adapter))
    layers.install(model)
    return model.eval()


def scores(trained: Any, shipped: Any, examples: Sequence[Any]) -> dict[str, list[float]]:
    """Per example: sums of NLL as trained and by the file, of KL, tokens with the same next one, tokens."""
    keys = ("nll_trained", "nll", "kl", "same", "tokens")
    rows = {key: [0.0] * len(examples) for key in keys}
    for (members, before, targets), (_, after, _) in zip(
        log_probs(trained, examples), log_probs(shipped, examples), strict=True
    ):
        found = {
            "nll_trained": -before.gather(1, targets)[:, 0],
            "nll": -after.gather(1, targets)[:, 0],
            "kl": (before.exp() * (before - after)).sum(1),
            "same": before.argmax(1) == after.argmax(1),
            "tokens": targets[:, 0] >= 0,
        }
        for key, values in found.items():
            _share_out(rows[key], values, members, examples)
    return rows


def losses(graph: Any, examples: Sequence[Any]) -> list[float]:
    """Per example: the sum of its NLL."""
    found = [0.0] * len(examples)
    for members, after, targets in log_probs(graph, examples):
        _share_out(found, -after.gather(1, targets)[:, 0], members, examples)
    return found


def _share_out(sums: list[float], values: Any, members: Sequence[int], examples: Sequence[Any]) -> None:
    """Add what was found per token of a pass to the examples that were in it."""
    from edgeft.train.batch import learned_count

    parts = values.double().split([learned_count(examples[member]) for member in members])
    for member, part in zip(members, parts, strict=True):
        sums[member] += float(part.sum())


def log_probs(model: Any, examples: Sequence[Any]) -> Iterator[tuple[Sequence[int], Any, Any]]:
    """By passes: which examples, the learned tokens' distributions (tokens, words), those tokens (tokens, 1)."""
    import torch

    from edgeft.train.batch import collate, learned_states, shared_prefix
    from edgeft.train.packing import best_fit_decreasing

    prefix = shared_prefix(examples)
    lengths = [len(example.tokens) - prefix for example in examples]
    for members in best_fit_decreasing(lengths, _PASS_TOKENS - prefix, range(len(examples))):
        batch = collate([examples[member] for member in members], prefix)
        with torch.no_grad():
            learned, head = learned_states(model, batch)
            logits = (learned @ head.weight.to(learned.dtype).t()).float()
        yield members, torch.log_softmax(logits, 1), batch["targets"][:, None]
