"""`edgeft diff`: what sets two artifacts apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeft.cli._output import ConsoleProgress, json_option, note, print_json, print_table

if TYPE_CHECKING:
    from edgeft.diff.report import Difference, TensorDifference

EPILOG = """
\b
Examples:
  edgeft diff bot-q4.gguf bot-q4_k_m.gguf                two files of one model
  edgeft diff old.gguf new.gguf --fail-on-difference     exit code 5 unless they are the same
  edgeft diff bot-q4.gguf bot-q4-onnx --data smart-home  answers on the test split
  edgeft diff a-lora.gguf b-lora.gguf --base base.gguf   two adapters on one base
"""


@click.command(epilog=EPILOG)
@click.argument("a")
@click.argument("b")
@click.option("--data", help="Data set whose answers both score; default: a few plain sentences.")
@click.option("--split", default="test", show_default=True, type=click.Choice(["test", "valid", "train"]))
@click.option("--limit", default=50, show_default=True, type=click.IntRange(min=1), help="Examples of --data to score.")
@click.option(
    "--base", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="GGUF that adapters go onto."
)
@click.option("--no-tensors", is_flag=True, help="Do not read the weights.")
@click.option("--no-logits", is_flag=True, help="Do not load the two into a runtime.")
@click.option("--runtime", default="auto", show_default=True, help="Runtime that loads GGUF files.")
@click.option("--fail-on-difference", is_flag=True, help="End with exit code 5 when anything differs.")
@json_option
def diff(
    a: str,
    b: str,
    data: str | None,
    split: str,
    limit: int,
    base: Path | None,
    no_tensors: bool,
    no_logits: bool,
    runtime: str,
    fail_on_difference: bool,
    as_json: bool,
) -> None:
    """What sets artifact B apart from A: metadata, chat template, tensor types, tensors, answers.

    A and B are .gguf files, ONNX directories, aliases or hf:org/name:file.gguf. Tensors are compared by their bytes,
    and where those differ by their values: relative RMS error ‖a − b‖ / ‖a‖. Answers are next-token probabilities on
    the same tokens, in the runtimes that would run the two. Between GGUF and ONNX, template and answers are compared.
    """
    from edgeft.diff.workflow import Wanted, compare

    examples = []
    if data is not None:
        from edgeft.data.load import load_split

        examples = load_split(data, split)[:limit]
    wanted = Wanted(examples, not no_tensors, not no_logits, base, runtime)
    found = compare(a, b, wanted, ConsoleProgress())
    if as_json:
        print_json(found.as_dict())
    else:
        _print(found)
    if fail_on_difference and not found.same:
        from edgeft.errors import CheckFailed

        raise CheckFailed(f"{found.a} and {found.b} differ", found.summary)


def _print(found: Difference) -> None:
    rows = [
        ("format", *found.formats),
        ("MB", *(f"{size / 1e6:.1f}" for size in found.bytes)),
        ("bits per weight", *("" if bits is None else f"{bits:.2f}" for bits in found.bits_per_weight)),
        *((f"{change.name} weights", f"{change.a:,}", f"{change.b:,}") for change in found.types),
        *((change.name, _short(change.a), _short(change.b)) for change in found.metadata),
    ]
    print_table(("", found.a, found.b), rows)
    click.echo(f"\nchat template: {found.template}; tokenizer: {found.tokenizer}")
    if found.tensors:
        _print_tensors(found.tensors)
    if logits := found.logits:
        click.echo(
            f"\n{logits.tokens} tokens of {logits.texts} texts: KL(A ‖ B) {logits.kl:.4g} nats per token "
            f"(worst {logits.kl_worst:.3g}), same top token {logits.same_top:.1%}, "
            f"NLL {logits.nll_a:.4f} and {logits.nll_b:.4f}"
        )
    for text in found.notes:
        note(f"note: {text}")
    click.echo(f"\n{found.summary}")


def _short(value: object) -> str:
    text = "–" if value is None else str(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _print_tensors(tensors: Sequence[TensorDifference]) -> None:
    """Alike tensors of all layers in one line."""
    groups: dict[tuple[str, str, str], list[TensorDifference]] = {}
    for tensor in tensors:
        if not tensor.equal:
            groups.setdefault((_generic(tensor.name), _stored(tensor, "a"), _stored(tensor, "b")), []).append(tensor)
    equal = sum(tensor.equal for tensor in tensors)
    click.echo(f"{equal} of {len(tensors)} tensors have the same bytes")
    if not groups:
        return
    click.echo()
    rows = [(len(members), name, a, b, *_apart(members)) for (name, a, b), members in groups.items()]
    print_table(("n", "tensor", "in A", "in B", "relative RMS error", "largest difference"), rows)


def _stored(tensor: TensorDifference, side: str) -> str:
    kind, shape, other = (
        (tensor.type_a, tensor.shape_a, tensor.shape_b)
        if side == "a"
        else (tensor.type_b, tensor.shape_b, tensor.shape_a)
    )
    if kind is None or shape is None:
        return "–"
    return kind if shape == other or other is None else f"{kind} {'x'.join(map(str, shape))}"


def _apart(members: Sequence[TensorDifference]) -> tuple[str, str]:
    rms = [tensor.relative_rms for tensor in members if tensor.relative_rms is not None]
    largest = [tensor.largest for tensor in members if tensor.largest is not None]
    if not rms:
        return "", f"{max(largest):.3g}" if largest else ""
    between = f"{min(rms):.3g}" if len(rms) == 1 else f"{min(rms):.3g} to {max(rms):.3g}"
    return between, f"{max(largest):.3g}"


def _generic(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
