"""`edgeft export`: base and adapter into one deployable file."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeft import config
from edgeft.cli._output import ConsoleProgress, dry_run_option, json_option, note, print_json, print_table

if TYPE_CHECKING:
    from edgeft.artifact import Artifact
    from edgeft.data.example import Example
    from edgeft.export import Export, Origin
    from edgeft.plugins import Plan
    from edgeft.verify.report import Finding

EPILOG = """
\b
Examples:
  edgeft export runs/demo                          demo-q4.gguf, 4 bits
  edgeft export runs/demo --dry-run                what would be written, tensor by tensor
  edgeft export smollm2-135m --to gguf-q8_0        a model without an adapter
  edgeft export ./base --adapter ./adapter --to gguf-q4_k_m --out bot.gguf
"""


@click.command(epilog=EPILOG)
@click.argument("model", metavar="RUN|MODEL")
@click.option(
    "--adapter", type=click.Path(exists=True, file_okay=False, path_type=Path), help="PEFT adapter to merge into MODEL."
)
@click.option(
    "--to",
    "target",
    help="gguf-q4 (default: the best real 4-bit mixture for the model's shapes), gguf-q4_k_m, gguf-q4_0, gguf-q8_0, "
    "gguf-bf16 or gguf-f16; onnx-q4, onnx-int8 or onnx-fp32.",
)
@click.option("--out", type=click.Path(path_type=Path), help="File to write; default: NAME-q4.gguf and the like, here.")
@click.option("--no-verify", is_flag=True, help="Do not load the file and compare it with the model afterwards.")
@click.option(
    "--round",
    "rounding",
    type=click.Choice(["none", "bf16", "f16"]),
    default="none",
    show_default=True,
    help="Round merged weights first, as merging to a 16-bit checkpoint would.",
)
@click.option(
    "--tokenizer-pre", metavar="NAME", help="llama.cpp's name of the pre-tokenizer, where edgeft asks for it."
)
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="A setting of the target; docs/onnx.md.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads that quantize; default: all cores.")
@json_option
@dry_run_option
def export(
    model: str,
    adapter: Path | None,
    target: str | None,
    out: Path | None,
    no_verify: bool,
    rounding: Any,
    tokenizer_pre: str | None,
    settings: Sequence[str],
    threads: int | None,
    as_json: bool,
    dry_run: bool,
) -> None:
    """Merge and quantize into one deployable file, in one pass over the weights.

    RUN|MODEL is a run of `edgeft train`, or a model: a Hugging Face directory, an alias, hf:org/name or a GGUF file.
    No torch, no 16-bit copy on disk. Beside the file goes a manifest with what it really contains.
    """
    from edgeft import export as workflow

    target = target or str(config.load()["export.target"].value)
    progress = ConsoleProgress()
    prepared = workflow.prepare(
        model,
        target,
        adapter=adapter,
        out=out,
        rounding=rounding,
        threads=threads,
        tokenizer_pre=tokenizer_pre,
        settings=dict(_setting(text) for text in settings),
        progress=progress,
    )
    for warning in prepared.plan.warnings:
        note(f"note: {warning}")
    if dry_run:
        _show_plan(prepared.plan, as_json)
        return
    started = time.monotonic()
    artifact = workflow.export(prepared, progress)
    seconds = time.monotonic() - started
    findings = [] if no_verify else _verify(prepared, artifact)
    _show_result(artifact, seconds, findings, as_json)
    _fail_on(findings, artifact)


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise click.UsageError(f"--set: write NAME=VALUE, such as block=32, not {text!r}")
    return name.strip(), value.strip()


def _verify(prepared: Export, artifact: Artifact) -> list[Finding]:
    """A small sample through the file; `edgeft verify` does the thorough job."""
    from edgeft.errors import MissingDependency
    from edgeft.sessions import open_session
    from edgeft.verify.quick import quick_check

    if not _fits_in_memory(prepared.plan.parameters):
        note(
            "note: not compared with the model, which would not fit into memory; edgeft verify does on a larger machine"
        )
        return []
    try:
        opened = open_session(str(artifact.path))
    except MissingDependency as error:
        note(f"note: not verified, no runtime can load the file: {error.message}")
        return []
    source = prepared.origin.source
    with opened.session as session:
        return quick_check(
            artifact.path, source, session, examples=_examples(prepared.origin), progress=ConsoleProgress()
        )


def _fits_in_memory(parameters: int) -> bool:
    """Whether base and merged weights in float32 leave half of the machine to others."""
    from edgeft.doctor import memory_gib

    memory = memory_gib()
    return memory is None or parameters * 4 / 2**30 < memory / 2


def _examples(origin: Origin) -> list[Example]:
    """A few of the examples the run was evaluated on; none when they are gone, the check then takes plain sentences."""
    from edgeft.errors import EdgeftError
    from edgeft.verify.examples import held_out
    from edgeft.verify.quick import SAMPLE

    if origin.run is None:
        return []
    try:
        examples, notes = held_out(origin.run)
    except EdgeftError as error:
        note(f"note: verified on plain sentences, not on the run's data: {error.message}")
        return []
    for text in notes:
        note(f"note: {text}")
    return examples[:SAMPLE]


def _fail_on(findings: Sequence[Finding], artifact: Artifact) -> None:
    from edgeft.errors import CheckFailed

    failed = [finding for finding in findings if not finding.ok]
    if failed:
        said = "; ".join(f"{finding.name}: {finding.detail}" for finding in failed)
        raise CheckFailed(
            f"{artifact.path} is written, but does not answer as the model does: {said}",
            "edgeft verify looks closer; --to gguf-q8_0 keeps more bits.",
        )


def _show_plan(plan: Plan, as_json: bool) -> None:
    if as_json:
        print_json(_plan_object(plan))
        return
    rows = [
        (count, _generic(name), "x".join(map(str, shape)), kind, f"{size / 1e6:.1f}", why)
        for (name, shape, kind, why), (count, size) in _grouped(plan).items()
    ]
    print_table(("n", "tensor", "shape", "type", "MB", "why"), rows)
    click.echo(
        f"\n{plan.options.out}: {plan.bytes / 1e6:.1f} MB, {plan.bits_per_weight:.2f} bits per weight, "
        f"{plan.parameters / 1e6:.1f} M weights" + (f", about {plan.seconds:.0f} s" if plan.seconds else "")
    )


def _grouped(plan: Plan) -> dict[tuple[str, tuple[int, ...], str, str], tuple[int, int]]:
    """Alike tensors of all layers together: (name without layer, shape, type, why) -> (how many, bytes)."""
    groups: dict[tuple[str, tuple[int, ...], str, str], tuple[int, int]] = {}
    for tensor in plan.tensors:
        key = (_generic(tensor.name), tensor.shape, tensor.type, tensor.note)
        count, size = groups.get(key, (0, 0))
        groups[key] = (count + 1, size + tensor.bytes)
    return groups


def _generic(name: str) -> str:
    parts = name.split(".")
    return ".".join(["blk", "*", *parts[2:]]) if parts[0] == "blk" else name


def _plan_object(plan: Plan) -> dict[str, Any]:
    types: Counter[str] = Counter()
    for tensor in plan.tensors:
        types[tensor.type] += tensor.bytes
    return {
        "out": str(plan.options.out),
        "target": plan.target,
        "bytes": plan.bytes,
        "parameters": plan.parameters,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "bytes_by_type": dict(types),
        "seconds": plan.seconds,
        "warnings": list(plan.warnings),
        "tensors": [
            {"name": t.name, "shape": list(t.shape), "type": t.type, "bytes": t.bytes, "note": t.note}
            for t in plan.tensors
        ],
    }


def _show_result(artifact: Artifact, seconds: float, findings: Sequence[Finding], as_json: bool) -> None:
    manifest = artifact.manifest
    assert manifest is not None
    if as_json:
        print_json(
            {
                "path": str(artifact.path),
                "target": manifest.target,
                "bytes": manifest.bytes,
                "bits_per_weight": round(manifest.bits_per_weight, 4),
                "types": manifest.types,
                "sha256": manifest.sha256,
                "seconds": round(seconds, 2),
                "notes": list(manifest.notes),
                "findings": [finding.as_dict() for finding in findings],
            }
        )
        return
    mix = ", ".join(
        f"{kind} {weights / sum(manifest.types.values()):.1%}"
        for kind, weights in sorted(manifest.types.items(), key=lambda entry: -entry[1])
    )
    click.echo(
        f"{artifact.path}  {manifest.bytes / 1e6:.1f} MB, {manifest.bits_per_weight:.2f} bits per weight ({mix}), "
        f"{seconds:.1f} s"
    )
    if findings:
        click.echo("verified: " + ", ".join(_finding(finding) for finding in findings))


def _finding(finding: Finding) -> str:
    figure = "" if finding.value is None else f" {finding.value:.4g}"
    return f"{finding.name}{figure} {'skipped' if finding.skipped else 'ok' if finding.ok else 'FAILED'}"
