"""Carries a plan out: threads merge and quantize slabs of rows, one writer appends them in the file's order."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np

from edgeft import __version__
from edgeft.artifact import Artifact, Manifest, manifest_path, write_manifest
from edgeft.errors import ModelError, WriteError
from edgeft.paths import atomic_write, sha256_file
from edgeft.plugins import Plan
from edgeft.progress import Progress

from .adapter import WEIGHTS
from .blas import single_threaded
from .ggml import TYPES, Ggml
from .gguf_items import Item, available_cores
from .gguf_plan import Details
from .gguf_writer import padded
from .leftovers import claim, remove_leftovers
from .merge import LoadedTensor
from .packed_rows import PackedTensor
from .safetensors_rows import Reader

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Rounding = Literal["none", "bf16", "f16"]

TERNARY, TERNARY_BLOCK = ("TQ1_0", "TQ2_0"), 256

SLAB_WEIGHTS = 1 << 18
"""Weights per slab: 1 MB of float32, so that a slab and its delta stay in a core's second-level cache."""

_SLABS_IN_FLIGHT = 48
"""What is quantized while the writer waits for the disk; at least four per thread. A Q8_0 slab is 0.3 MB."""

_SYNC_BYTES = 64 << 20
"""Hand this much at a time to the disk while the cores work, instead of all of it at the end."""


@dataclass(frozen=True)
class Slab:
    item: Item
    last: bool
    """Whether the tensor ends here (and is padded)."""
    weights: int
    bytes: Future[NDArray[np.uint8]]


def convert(plan: Plan, ggml: Ggml, progress: Progress) -> Artifact:
    """Write the file, then its manifest.

    Raises:
        ModelError: a weight is not finite or a file of the model cannot be read.
        WriteError: no space, or the folder cannot be written.
    """
    details: Details = plan.details
    out = plan.options.out
    check_space(out, plan.bytes)
    remove_leftovers(out)
    threads = plan.options.threads or available_cores()
    progress.start("Quantizing", plan.parameters, "weights")
    try:
        digest = _write(details, plan, ggml, threads, progress)
    finally:
        progress.finish()
    manifest = _manifest(plan, details, digest)
    try:
        write_manifest(out, manifest)
    except WriteError:
        out.unlink()  # a command that failed leaves no result
        raise
    return Artifact(out, manifest)


def check_space(out: Path, size: int) -> None:
    """Raises: WriteError when the folder of `out` cannot be written or its disk has less than `size` bytes free."""
    folder = next(parent for parent in (out.parent, *out.parent.absolute().parents) if parent.exists())
    if not os.access(folder, os.W_OK):
        raise WriteError(f"cannot write {out}: {folder} is read-only for you", "Choose another folder with --out.")
    usage = shutil.disk_usage(folder)
    # Some file systems do not say how large they are.
    if usage.total and usage.free < size:
        raise WriteError(
            f"{out} needs {size / 1e6:,.1f} MB, {folder} has {usage.free / 1e6:,.1f} MB free",
            "Free some space or choose another --out.",
        )


def _write(details: Details, plan: Plan, ggml: Ggml, threads: int, progress: Progress) -> str:
    """Returns: hex SHA-256 of the file."""
    out = plan.options.out
    with atomic_write(out) as stream, Reader() as reader, single_threaded():
        claim(stream)
        sink = _Sink(stream)
        sink.write(details.head)
        with ThreadPoolExecutor(threads) as workers:
            pool = _Pool(workers, reader, ggml, plan.options.round, bool(plan.options.extra.get("force")))
            try:
                for slab in _in_order(details.items, pool, max(_SLABS_IN_FLIGHT, 4 * threads)):
                    sink.write(slab.bytes.result().reshape(-1).data)
                    if slab.last:
                        sink.write(bytes(padded(sink.size) - sink.size))
                    progress.advance(slab.weights, slab.item.name)
            except BaseException:
                workers.shutdown(cancel_futures=True)
                raise
        # An older manifest must not stand beside the new file, whenever the power fails.
        manifest_path(out).unlink(missing_ok=True)
        return sink.digest.hexdigest()


class _Sink:
    """Appends, hashes on the way, and keeps the disk busy while the cores are."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._synced = 0
        self.size = 0
        self.digest = hashlib.sha256()

    def write(self, view: bytes | memoryview) -> None:
        self.digest.update(view)
        self._stream.write(view)
        self.size += len(view)
        if self.size - self._synced >= _SYNC_BYTES:
            self._stream.flush()
            _sync(self._stream.fileno())
            self._synced = self.size


@dataclass(frozen=True)
class _Pool:
    """Hands slabs to the threads."""

    threads: ThreadPoolExecutor
    reader: Reader
    ggml: Ggml
    rounding: Rounding
    force: bool
    """Store ordinary weights as ternary."""

    def slabs(self, item: Item) -> Iterator[Slab]:
        """A tensor's slabs, each put to work when the caller asks for it."""
        if isinstance(item.source, np.ndarray):
            done: Future[NDArray[np.uint8]] = Future()
            done.set_result(item.source.view(np.uint8))
            yield Slab(item, True, 0, done)
            return
        if isinstance(item.source, PackedTensor):
            yield from self._copies(item, item.source)
            return
        step, parts = slab_rows(item), item.source.parts
        rows = item.rows // len(parts)
        for at, part in enumerate(parts):
            known = item.importance if item.importance is None or len(parts) == 1 else item.importance[at]
            loaded = part.load(self.reader, self.ggml)
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                future = self.threads.submit(self._encode, loaded, item, known, start, stop)
                last = part is parts[-1] and stop == rows
                yield Slab(item, last, (stop - start) * item.columns, future)

    def _copies(self, item: Item, source: PackedTensor) -> Iterator[Slab]:
        self.reader.open_file(source.stored)
        step = slab_rows(item)
        for start in range(0, item.rows, step):
            stop = min(start + step, item.rows)
            rows = self.threads.submit(source.rows, self.reader, start, stop)
            yield Slab(item, stop == item.rows, (stop - start) * item.columns, rows)

    def _encode(
        self, loaded: LoadedTensor, item: Item, importance: NDArray[np.float32] | None, start: int, stop: int
    ) -> NDArray[np.uint8]:
        weights = loaded.rows(start, stop, None if self.rounding == "none" else TYPES[self.rounding.upper()])
        try:
            if item.type.name in TERNARY and not self.force:
                check_ternary(weights)
            return self.ggml.quantize(item.type, weights, importance)
        except ModelError as error:
            raise ModelError(f"tensor {item.name}, rows {start} to {stop - 1}: {error.message}", error.hint) from error


def check_ternary(weights: NDArray[np.float32]) -> None:
    """Raises: ModelError unless every block of 256 holds -s, 0 and s only, with s a float16."""
    blocks = np.abs(weights.reshape(-1, TERNARY_BLOCK))
    scales = blocks.max(axis=1, keepdims=True)
    stored = scales.astype(np.float16).astype(np.float32)
    rounded = np.where(blocks >= stored / 2, stored, 0)
    if np.array_equal(blocks, rounded):
        return
    error = float(np.sqrt(np.square(blocks - rounded).sum() / np.square(blocks).sum()))
    raise ModelError(
        f"the weights are not ternary: {error:.0%} of their norm would be lost",
        "Take --to gguf-q4, or train ternary weights: edgeft train --for gguf-tq2_0. --force stores them all the same.",
    )


def slab_rows(item: Item) -> int:
    """Rows per slab: whole groups, at least one."""
    groups = SLAB_WEIGHTS // (item.columns * item.row_group)
    return max(1, groups) * item.row_group


def _in_order(items: tuple[Item, ...], pool: _Pool, window: int) -> Iterator[Slab]:
    """Slabs in the file's order, with up to `window` of them under way."""
    under_way: deque[Slab] = deque()
    for item in items:
        for slab in pool.slabs(item):
            under_way.append(slab)
            if len(under_way) >= window:
                yield under_way.popleft()
    yield from under_way


def _manifest(plan: Plan, details: Details, digest: str) -> Manifest:
    mix: dict[str, int] = {}
    for item in details.items:
        mix[item.type.name] = mix.get(item.type.name, 0) + item.weights
    return Manifest(
        format="gguf",
        target=plan.target,
        types=mix,
        parameters=plan.parameters,
        bits_per_weight=plan.bits_per_weight,
        bytes=plan.bytes,
        sha256=digest,
        base={"reference": plan.source.reference, "path": str(plan.source.base)},
        adapter=_adapter(plan),
        chat_template_sha256=details.chat_template_sha256,
        stop_token_ids=details.stop_token_ids,
        notes=_notes(plan),
        edgeft_version=__version__,
    )


def _adapter(plan: Plan) -> dict[str, Any] | None:
    folder = plan.source.adapter
    return None if folder is None else {"path": str(folder), "digest": sha256_file(folder / WEIGHTS)}


def _notes(plan: Plan) -> tuple[str, ...]:
    rounding = plan.options.round
    rounded = () if rounding == "none" else (f"merged weights were rounded to {rounding} before quantization",)
    return (*plan.warnings, *sorted({tensor.note for tensor in plan.tensors if tensor.note}), *rounded)


# Not every system has fdatasync, which leaves the file's times alone.
_sync = getattr(os, "fdatasync", os.fsync)
