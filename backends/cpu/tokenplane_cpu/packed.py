"""A decoder whose weights are packed: what a native program computes with, and how it goes from process to process.

Imports no torch: who packs (packing.py) does, who computes does not.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterable, Sequence
from ctypes import Array, Structure, c_void_p
from dataclasses import dataclass
from typing import BinaryIO

from .memory import address, zeroed_memory
from .structs import DecoderStruct, LayerStruct

ALIGNMENT = 64  # bytes; a cache line, and a row of an AMX tile


@dataclass(frozen=True, slots=True)
class Piece:
    """Memory that a decoder's structs point into, which stays where it is as long as its owner does."""

    address: int
    size_bytes: int
    owner: object


@dataclass(frozen=True, slots=True)
class PackedDecoder:
    """Not changed by who computes with it. `DecoderStruct.layers` is null: whoever needs it has a copy of its own."""

    decoder: DecoderStruct
    layers: Array[LayerStruct]  # without a cache
    form: str  # of the weights, for people
    pieces: Sequence[Piece]

    @property
    def weights_bytes(self) -> int:
        return sum(piece.size_bytes for piece in self.pieces)

    @property
    def vocab_size(self) -> int:
        return int(self.decoder.head.outputs)


@dataclass(frozen=True, slots=True)
class Outline:
    """A packed decoder without its memory."""

    decoder: bytes
    layers: bytes
    form: str
    pieces: list[tuple[int, int]]  # address and size where it was packed, in the order in which they are sent


def outline(packed: PackedDecoder) -> Outline:
    pieces = [(piece.address, piece.size_bytes) for piece in packed.pieces]
    return Outline(bytes(packed.decoder), bytes(packed.layers), packed.form, pieces)


def send_pieces(packed: PackedDecoder, pipe: BinaryIO) -> None:
    """Write the memory of all pieces, one behind the other.

    Changes:
        Memory mappings among the owners are empty afterwards, so that no large piece is in memory twice for long.
    """
    for piece in packed.pieces:
        pipe.write((ctypes.c_char * piece.size_bytes).from_address(piece.address))
        if isinstance(piece.owner, mmap.mmap):
            piece.owner.madvise(mmap.MADV_DONTNEED)


def receive_pieces(sent: Outline, pipe: BinaryIO) -> PackedDecoder:
    """The packed decoder, its memory read from the other end of `send_pieces`, on huge pages like the original.

    Raises:
        EOFError: the other end was closed before the last byte.
    """
    offsets = _offsets(size for _, size in sent.pieces)
    memory = zeroed_memory(offsets[-1])
    whole, base = memoryview(memory), address(memory)
    pieces, moves = [], []
    for (old, size), offset in zip(sent.pieces, offsets, strict=False):
        _fill(whole[offset : offset + size], pipe)
        pieces.append(Piece(base + offset, size, memory))
        moves.append((old, size, base + offset - old))

    def moved(pointer: int) -> int:
        return pointer + next(by for old, size, by in moves if old <= pointer < old + size)

    decoder = DecoderStruct.from_buffer_copy(sent.decoder)
    layers = (LayerStruct * decoder.num_layers).from_buffer_copy(sent.layers)
    for struct in (decoder, *layers):
        _change_pointers(struct, moved)
    return PackedDecoder(decoder, layers, sent.form, pieces)


def _offsets(sizes: Iterable[int]) -> list[int]:
    """Where each of some pieces begins in one memory, and behind them how large it is."""
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
    return offsets


def _fill(room: memoryview, pipe: BinaryIO) -> None:
    while room:
        count = pipe.readinto(room)  # type: ignore[attr-defined]
        if not count:
            raise EOFError("the pipe ended")
        room = room[count:]


def _change_pointers(struct: Structure, change: Callable[[int], int]) -> None:
    """Each pointer of a struct and of those inside it; null stays null."""
    for name, kind, *_ in struct._fields_:
        value = getattr(struct, name)
        if isinstance(value, Structure):
            _change_pointers(value, change)
        elif kind is c_void_p and value is not None:
            setattr(struct, name, change(value))
