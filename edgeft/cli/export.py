"""`edgeft export`: base and adapter into one deployable file."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeft.cli._output import ConsoleProgress, dry_run_option, json_option, made, note, print_json, print_table
from edgeft.errors import UsageError

if TYPE_CHECKING:
    from edgeft.artifact import Artifact
    from edgeft.data.example import Example
    from edgeft.export import Origin
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


def _list_targets(as_json: bool) -> None:
    from edgeft import plugins

    found = [
        {"target": target.name, "bits_per_weight": target.bits_per_weight, "description": target.description}
        for name in plugins.names("converters")
        for target in plugins.load("converters", name).targets.values()
    ]
    if as_json:
        print_json(found)
        return
    rows = [(each["target"], f"{each['bits_per_weight']:g}", each["description"]) for each in found]
    print_table(("target", "bits", "what it is"), rows)


@click.command(epilog=EPILOG)
@click.argument("model", metavar="RUN|MODEL", required=False)
@click.option(
    "--adapter", type=click.Path(exists=True, file_okay=False, path_type=Path), help="PEFT adapter to merge into MODEL."
)
@click.option(
    "--to",
    "target",
    help="gguf-q4 (default: the best real 4-bit mixture for the model's shapes), gguf-q4_k_m, gguf-q8_0, onnx-q4 "
    "and so on; gguf-lora: the adapter alone, not merged (default for a run on a GGUF); --list shows all.",
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
    "--merge-base",
    type=click.Choice(["w16", "nf4-roundtrip"]),
    help="What an adapter trained on NF4 is merged into: the base's own weights, or those rounded to NF4 and back. "
    "Default: nf4-roundtrip for a run of QLoRA, which loses least (docs/quantization-aware.md).",
)
@click.option(
    "--tokenizer-pre", metavar="NAME", help="llama.cpp's name of the pre-tokenizer, where edgeft asks for it."
)
@click.option(
    "--type-override",
    "overrides",
    metavar="REGEX=TYPE",
    multiple=True,
    help="Type of tensors whose GGUF name fits, such as 'ffn_down=q6_k'; may be repeated, the first that fits wins.",
)
@click.option(
    "--imatrix",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Importance matrix (GGUF, of edgeft imatrix or llama-imatrix): errors weigh as much as columns are used.",
)
@click.option(
    "--calibrate",
    is_flag=True,
    help="Make the importance matrix first, from the run's training data or --data.",
)
@click.option("--data", help="Data set to calibrate on, where MODEL is not a run.")
@click.option("--fit", metavar="SIZE", help="Choose types so that the file has at most this size: 90MB, 85.8MiB.")
@click.option("--bpw", type=click.FloatRange(min=1), help="Choose types for so many bits per weight: 4.5.")
@click.option("--device", help="Choose types for the largest file that DEVICE has room for (edgeft devices list).")
@click.option(
    "--ctx", "context", type=click.IntRange(min=1), help="With --device: tokens of context it must have room for."
)
@click.option("--force", is_flag=True, help="Store ordinary weights in a ternary type all the same.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="A setting of the target; docs/onnx.md.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads that quantize; default: all cores.")
@click.option("--list", "list_", is_flag=True, help="List the targets, and stop.")
@click.option(
    "--engine",
    type=click.Choice(["edgeft", "llama.cpp", "optimum"]),
    default="edgeft",
    show_default=True,
    help="For models edgeft does not know: llama.cpp: in three passes with your checkout; optimum: the graph of an "
    "ONNX folder, by `edgeft toolchain install optimum`.",
)
@click.option(
    "--llama-cpp",
    "checkout",
    type=click.Path(file_okay=False, path_type=Path),
    help="llama.cpp's folder, with llama-quantize built.",
)
@json_option
@dry_run_option
def export(
    model: str | None,
    adapter: Path | None,
    target: str | None,
    out: Path | None,
    no_verify: bool,
    rounding: Any,
    merge_base: Any,
    tokenizer_pre: str | None,
    overrides: tuple[str, ...],
    imatrix: Path | None,
    calibrate: bool,
    data: str | None,
    fit: str | None,
    bpw: float | None,
    device: str | None,
    context: int | None,
    force: bool,
    settings: Sequence[str],
    threads: int | None,
    engine: str,
    checkout: Path | None,
    list_: bool,
    as_json: bool,
    dry_run: bool,
) -> None:
    """Merge and quantize into one deployable file, in one pass over the weights.

    RUN|MODEL is a run of `edgeft train`, or a model: a Hugging Face directory, an alias, hf:org/name or a GGUF file.
    No torch, no 16-bit copy on disk. Beside the file goes a manifest with what it really contains.
    """
    if list_:
        _list_targets(as_json)
        return
    if model is None:
        raise UsageError("what is to be exported?", "edgeft export RUN|MODEL --to TARGET")
    from edgeft import export as workflow
    from edgeft.fit import parse_size

    if sum(map(bool, (fit, bpw, device))) > 1:
        raise click.UsageError("--fit, --bpw and --device are three ways to say one thing: give one of them")
    by_size = bool(fit or bpw or device)
    if by_size:
        target = target or "gguf"
    progress = ConsoleProgress()
    if engine == "llama.cpp":
        origin = workflow.with_merge_base(workflow.find(model, adapter, progress), merge_base)
        target = target or workflow.default_target(origin)
        origin = workflow.for_target(origin, target)
        out = out or Path(workflow.default_name(origin.name, target))
        _three_passes(origin, target, out, checkout, no_verify=no_verify, as_json=as_json, dry_run=dry_run)
        return
    given = dict(_setting(text) for text in settings)
    if engine == "optimum":
        origin = workflow.with_merge_base(workflow.find(model, adapter, progress), merge_base)
        target = target or "onnx-q4"
        out = out or Path(workflow.default_name(origin.name, target))
        _optimum(origin, target, out, given, progress, no_verify=no_verify, as_json=as_json, dry_run=dry_run)
        return
    extra = {
        "tokenizer_pre": tokenizer_pre,
        "types": _overrides(overrides),
        "imatrix": imatrix,
        "bytes": parse_size(fit) if fit else _device_bytes(model, adapter, device, context, progress),
        "bits_per_weight": bpw,
        "force": force,
        "settings": given,
    }
    with contextlib.ExitStack() as stack:
        if calibrate or (imatrix is None and by_size):
            origin = workflow.find(model, adapter, progress)
            extra["imatrix"] = stack.enter_context(_importance(origin, data, progress, dry_run))
        prepared = workflow.prepare(
            model,
            target,
            adapter=adapter,
            out=out,
            rounding=rounding,
            threads=threads,
            merge_base=merge_base,
            extra=extra,
            progress=progress,
        )
    if target is None and prepared.origin.source.gguf:
        note(f"note: trained on {prepared.origin.source.gguf.name} itself: writing the adapter alone (gguf-lora)")
    for warning in prepared.plan.warnings:
        note(f"note: {warning}")
    if dry_run:
        _show_plan(prepared.plan, as_json)
        return
    started = time.monotonic()
    artifact = workflow.export(prepared, progress)
    seconds = time.monotonic() - started
    findings = [] if no_verify else _verify(prepared.origin, prepared.plan.parameters, artifact)
    _show_result(artifact, seconds, findings, as_json)
    _fail_on(findings, artifact)


def _device_bytes(
    model: str, adapter: Path | None, device: str | None, context: int | None, progress: ConsoleProgress
) -> int | None:
    from edgeft.export import find
    from edgeft.fit import device_budget

    if device is None:
        return None
    size = device_budget(find(model, adapter, progress), device, context)
    note(f"note: {device}: a file of at most {size / 1e6:.1f} MB")
    return size


@contextlib.contextmanager
def _importance(origin: Origin, data: str | None, progress: ConsoleProgress, dry_run: bool) -> Iterator[Path]:
    """The importance matrix, kept for the next export, or for a dry run only as long as that lasts."""
    from edgeft.export import calibrate
    from edgeft.fit import measured

    if dry_run:
        with measured(origin, data, progress) as file:
            yield file
        return
    file = calibrate(origin, data, Path(f"{origin.name}.imatrix.gguf"), progress=progress)
    note(f"note: wrote {file}; --imatrix {file} uses it again")
    yield file


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise click.UsageError(f"--set: write NAME=VALUE, such as block=32, not {text!r}")
    return name.strip(), value.strip()


def _overrides(texts: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    pairs = [text.rpartition("=") for text in texts]
    for (expression, _, _), text in zip(pairs, texts, strict=True):
        if not expression:
            raise click.BadParameter(f"{text!r} is not REGEX=TYPE", param_hint="--type-override")
    return tuple((expression, kind) for expression, _, kind in pairs)


def _optimum(
    origin: Origin,
    target: str,
    out: Path,
    settings: dict[str, str],
    progress: ConsoleProgress,
    *,
    no_verify: bool,
    as_json: bool,
    dry_run: bool,
) -> None:
    from edgeft import optimum_route

    optimum_route.check(origin, target)
    if dry_run:
        note(f"would merge into float32, export the graph with Optimum, and write {out} as {target}")
        return
    started = time.monotonic()
    artifact = optimum_route.run(origin, target, out, settings, progress)
    seconds = time.monotonic() - started
    assert artifact.manifest is not None
    findings = [] if no_verify else _verify(origin, artifact.manifest.parameters, artifact)
    _show_result(artifact, seconds, findings, as_json)
    _fail_on(findings, artifact)


def _three_passes(
    origin: Origin, target: str, out: Path, checkout: Path | None, *, no_verify: bool, as_json: bool, dry_run: bool
) -> None:
    from edgeft import three_passes

    passes = three_passes.plan(origin, target, out, checkout)
    if dry_run:
        commands = passes.commands(Path("WORK"))
        if as_json:
            print_json(
                {"out": str(out), "target": target, "merge": origin.source.adapter is not None, "commands": commands}
            )
            return
        for line in (["merge with PEFT into WORK/merged"] if origin.source.adapter else []) + [
            " ".join(c) for c in commands
        ]:
            click.echo(line)
        return
    started = time.monotonic()
    artifact = three_passes.run(passes, ConsoleProgress())
    seconds = time.monotonic() - started
    assert artifact.manifest is not None
    findings = [] if no_verify else _verify(origin, artifact.manifest.parameters, artifact)
    _show_result(artifact, seconds, findings, as_json)
    _fail_on(findings, artifact)


def _verify(origin: Origin, parameters: int, artifact: Artifact) -> list[Finding]:
    """A small sample through the file; `edgeft verify` does the thorough job."""
    from edgeft.errors import MissingDependency
    from edgeft.plugins import AdapterScale
    from edgeft.sessions import open_session
    from edgeft.verify.quick import quick_check

    if not _fits_in_memory(parameters):
        note(
            "note: not compared with the model, which would not fit into memory; edgeft verify does on a larger machine"
        )
        return []
    source = origin.source
    lone = artifact.manifest is not None and artifact.manifest.format == "adapter"
    if lone and source.gguf is None:
        note(f"note: not verified without its base: edgeft verify RUN {artifact.path} --base BASE.gguf")
        return []
    file = source.gguf if lone and source.gguf else artifact.path
    try:
        opened = open_session(str(file), adapters=[AdapterScale(artifact.path)] if lone else (), needs="scores")
    except MissingDependency as error:
        note(f"note: not verified, no runtime can load the file: {error.message}")
        return []
    with opened.session as session:
        return quick_check(file, source, session, examples=_examples(origin), progress=ConsoleProgress())


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
        "fallbacks": sum(bool(tensor.note) for tensor in plan.tensors),
        "groups": [
            {"count": count, "name": _generic(name), "shape": list(shape), "type": kind, "bytes": size, "note": why}
            for (name, shape, kind, why), (count, size) in _grouped(plan).items()
        ],
        "tensors": [
            {"name": t.name, "shape": list(t.shape), "type": t.type, "bytes": t.bytes, "note": t.note}
            for t in plan.tensors
        ],
    }


def _show_result(artifact: Artifact, seconds: float, findings: Sequence[Finding], as_json: bool) -> None:
    manifest = artifact.manifest
    assert manifest is not None
    made(artifact.path)
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
