"""onnxruntime's blocks of 4 and 8 bits: MatMulNBits with zero points, in numpy, and as rows of bytes.

A weight is (code - zero point) · scale, with a scale and a zero point per 32 weights of a row. onnxruntime's rule
(`QuantizeBlockwise` behind `quantize_matmul_4bits`), whose numbers these are (tests/test_nbits.py):

    lo = min(x, 0), hi = max(x, 0) of the block; scale = (hi - lo) / (2^bits - 1)
    zero point = round(-lo / scale), code = round(x · 1/scale + zero point), both from 0 to 2^bits - 1

A packed row is what a run keeps of one: codes (`bits` per weight, the low half of a byte first), float32 scales, zero
points (`bits` each).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgeft.errors import ModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Bytes = NDArray[np.uint8]

BLOCK = 32

KINDS = {"INT4": 4, "INT8": 8}
"""Name of a type in packed weights -> bits of a code."""


@dataclass(frozen=True)
class Layout:
    """Where the parts of a packed row lie, in bytes."""

    bits: int
    columns: int

    @property
    def blocks(self) -> int:
        return self.columns // BLOCK

    @property
    def codes(self) -> int:
        return self.columns * self.bits // 8

    @property
    def zeros(self) -> int:
        return -(-self.blocks * self.bits // 8)

    @property
    def bytes(self) -> int:
        return self.codes + 4 * self.blocks + self.zeros


def layout_of(kind: str, row_bytes: int) -> Layout:
    """The layout with so many bytes per row. Raises: ModelError."""
    bits = KINDS[kind]
    guess = row_bytes * 8 // (BLOCK * bits + 32 + bits)  # odd numbers of blocks leave half a byte of zero points
    for blocks in (guess, guess - 1):
        layout = Layout(bits, blocks * BLOCK)
        if blocks > 0 and layout.bytes == row_bytes:
            return layout
    raise ModelError(f"{row_bytes} bytes are not a row of {kind}")


def blocks_of(weights: Floats, bits: int) -> tuple[Floats, Floats, Floats]:
    """Codes (rows, blocks, 32), scales and zero points (rows, blocks), all float32; rows are whole blocks."""
    blocks = weights.reshape(len(weights), -1, BLOCK)
    largest = np.float32((1 << bits) - 1)
    low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
    scales = (high - low) / largest
    some = scales != 0
    divisors = np.where(some, scales, np.float32(1))
    zeros = np.clip(np.floor(-low / divisors + np.float32(0.5)), 0, largest)
    codes = blocks * np.where(some, np.float32(1) / divisors, np.float32(0))[:, :, None]
    codes += zeros[:, :, None]
    codes += np.float32(0.5)
    np.floor(codes, out=codes)
    np.clip(codes, 0, largest, out=codes)
    return codes, scales, zeros


def values(weights: Floats, bits: int) -> Floats:
    """What a runtime computes with, (rows, columns)."""
    codes, scales, zeros = blocks_of(weights, bits)
    codes -= zeros[:, :, None]
    codes *= scales[:, :, None]
    return codes.reshape(weights.shape)


def pack(weights: Floats, bits: int) -> Bytes:
    """Packed rows, (rows, bytes per row). Raises: ModelError when a weight is not finite."""
    layout = Layout(bits, weights.shape[1])
    if not np.isfinite(weights).all():
        raise ModelError("weights are not finite", "Train with a lower rate.")
    codes, scales, zeros = blocks_of(weights, bits)
    packed = np.zeros((len(weights), layout.bytes), np.uint8)
    packed[:, : layout.codes] = _in_bytes(codes.reshape(weights.shape), bits)
    packed[:, layout.codes : -layout.zeros] = scales.view(np.uint8)
    packed[:, -layout.zeros :] = _in_bytes(zeros, bits)
    return packed


def split(packed: Bytes, layout: Layout) -> tuple[Bytes, Floats, Bytes]:
    """Codes (rows, blocks, bytes), scales (rows, blocks) and zero points (rows, bytes) as MatMulNBits takes them."""
    rows = len(packed)
    codes = packed[:, : layout.codes].reshape(rows, layout.blocks, -1)
    scales = np.ascontiguousarray(packed[:, layout.codes : -layout.zeros]).view(np.float32)
    return codes, scales, packed[:, -layout.zeros :]


def unpack(packed: Bytes, layout: Layout) -> Floats:
    """The values of packed rows, (rows, columns)."""
    codes, scales, zeros = split(packed, layout)
    wide = _from_bytes(codes.reshape(len(packed), -1), layout.bits).reshape(len(packed), layout.blocks, BLOCK)
    wide -= _from_bytes(zeros, layout.bits)[:, : layout.blocks, None]
    wide *= scales[:, :, None]
    return wide.reshape(len(packed), layout.columns)


def _in_bytes(numbers: Floats, bits: int) -> Bytes:
    whole = numbers.astype(np.uint8)
    if bits == 8:
        return whole
    if whole.shape[1] % 2:  # of zero points; onnxruntime's fills up with the middle
        whole = np.pad(whole, ((0, 0), (0, 1)), constant_values=8)
    result: Bytes = np.bitwise_or(whole[:, 0::2], whole[:, 1::2] << 4, dtype=np.uint8)
    return result


def _from_bytes(stored: Bytes, bits: int) -> Floats:
    if bits == 8:
        return stored.astype(np.float32)
    wide = np.empty((len(stored), 2 * stored.shape[1]), np.float32)
    wide[:, 0::2], wide[:, 1::2] = stored & 15, stored >> 4
    return wide
