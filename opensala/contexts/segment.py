"""One segment of a context on disk: some pages of a text, its tokens there, and the states behind the last
one.

A segment is a safetensors file that is never changed once it is there:

    tokens           int32 [n]                       token ids
    kv.L             [pages, 2, block_size, Hkv, D]  keys and values of sparse layer L, page by page
                                                     (int8: D + 4, as `ops.sparse.int8` says)
    k1.L, k2.L       [pages, slots, Hkv, D]          compressed keys
    sums.L           uint8 [pages, 16]               checksum of each page's keys and values together
    state.L          float32 [H, D, D]               of Lightning layer L, if the segment ends at a snapshot

Whoever refers to a segment keeps its size, the checksum of its header and those of its tensors, but for keys
and values, whose sums lie in the segment: pages can be read and checked one by one. It knows files, numpy and
torch.
"""

import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from ..model.traffic import Counter
from .checks import SUM_BYTES, checksum, damaged, write_file

_NAMES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.int8: "I8",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_MOST_HEADER = 1 << 24  # bytes


@dataclass(frozen=True)
class Part:
    """Pages of one sparse layer: keys and values, k1 and k2, each `[pages, ...]`, on the CPU."""

    kv: Tensor
    k1: Tensor
    k2: Tensor


@dataclass(frozen=True)
class Written:
    """What is to be known of a segment to read it again.

    Attributes:
        file: its name in the folder.
        size: bytes.
        header: checksum of its header.
        sums: checksums of its tensors (hexadecimal), without keys and values.
        first_token, end_token: the tokens in it.
        first_page, pages: the pages in it, counted from the beginning of the text.
        state: whether it holds the states behind its last token.
    """

    file: str
    size: int
    header: str
    sums: dict[str, str]
    first_token: int
    end_token: int
    first_page: int
    pages: int
    state: bool

    @property
    def end_page(self) -> int:
        return self.first_page + self.pages


def as_bytes(tensor: Tensor) -> np.ndarray:
    """The bytes of a contiguous CPU tensor, `[first dimension, bytes of the rest]`; the memory is shared."""
    flat = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return flat.reshape(tensor.shape[0], -1) if tensor.dim() > 1 and tensor.shape[0] else flat.reshape(1, -1)


def write_segment(
    path: Path,
    tokens: np.ndarray,
    parts: Mapping[int, Part],
    states: Mapping[int, Tensor],
    *,
    first_token: int,
    first_page: int,
) -> Written:
    """Write a segment whole.

    Args:
        tokens: int32 ids from `first_token` on.
        parts: pages from `first_page` on, by layer.
        states: by layer; empty if the segment does not end at a snapshot.

    Raises:
        OSError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {"tokens": torch.from_numpy(np.ascontiguousarray(tokens, np.int32))}
    for layer, part in parts.items():
        tensors[f"k1.{layer}"], tensors[f"k2.{layer}"] = part.k1, part.k2
        sums = b"".join(checksum(page.data) for page in as_bytes(part.kv))
        tensors[f"sums.{layer}"] = torch.frombuffer(bytearray(sums), dtype=torch.uint8).view(-1, SUM_BYTES)
    tensors |= {f"state.{layer}": state for layer, state in states.items()}
    tensors |= {f"kv.{layer}": part.kv for layer, part in parts.items()}
    header, size = _header(tensors)

    def write(file: IO[bytes]) -> None:
        file.write(header)
        for tensor in tensors.values():
            file.write(as_bytes(tensor).data)

    write_file(path, write)
    sums_of = {
        name: checksum(as_bytes(tensor).data).hex()
        for name, tensor in tensors.items()
        if not name.startswith("kv.")
    }
    pages = len(next(iter(parts.values())).kv) if parts else 0
    return Written(
        path.name,
        size,
        checksum(header).hex(),
        sums_of,
        first_token,
        first_token + len(tokens),
        first_page,
        pages,
        bool(states),
    )


def _header(tensors: Mapping[str, Tensor]) -> tuple[bytes, int]:
    """The safetensors header, its length in front, and the size of the whole file."""
    record, place = {}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        record[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, place + size],
        }
        place += size
    text = json.dumps(record, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, 8 + len(text) + place


class SegmentFile:
    """A segment, open for reading. It stays readable if its name is removed.

    Args:
        path: the file.
        known: what was noted when it was written.
        counter: is told of what is read.

    Raises:
        DamagedContext: it is not there, has another size, or another header.
    """

    def __init__(self, path: Path, known: Written, counter: Counter | None = None) -> None:
        self.path, self.known, self.counter = path, known, counter or Counter()
        try:
            self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise damaged(path, "the segment", f"a file of {known.size:,} bytes", "none") from None
        except OSError as error:
            raise damaged(path, "the segment", "a readable file", error.strerror or str(error)) from error
        try:
            size = os.fstat(self._handle).st_size
            if size != known.size:
                raise damaged(path, "the length", f"{known.size:,} bytes", f"{size:,}")
            self._tensors = self._read_header()
        except BaseException:
            self.close()
            raise
        self._sums: dict[int, bytes] = {}
        self._places: dict[int, tuple[int, int]] = {}

    def _read_header(self) -> dict[str, tuple[torch.dtype, list[int], int]]:
        """Dtype, shape and place of each tensor."""
        (length,) = struct.unpack("<Q", self._read(0, 8))
        if not 0 < length <= min(_MOST_HEADER, self.known.size - 8):
            raise damaged(self.path, "the header", "a length within the file", f"{length:,} bytes")
        header = self._read(0, 8 + length)
        found = checksum(header).hex()
        if found != self.known.header:
            raise damaged(self.path, "the header", f"checksum {self.known.header}", found)
        try:
            return {
                name: (_DTYPES[entry["dtype"]], entry["shape"], 8 + length + entry["data_offsets"][0])
                for name, entry in json.loads(header[8:]).items()
            }
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise damaged(self.path, "the header", "that of a safetensors file", repr(error)) from error

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __del__(self) -> None:
        if getattr(self, "_handle", -1) >= 0:
            self.close()

    def _read(self, place: int, size: int) -> bytearray:
        data = bytearray(size)
        self._read_into([memoryview(data)], place)
        return data

    def _read_into(self, targets: list[memoryview], place: int) -> None:
        while targets:
            try:
                count = os.preadv(self._handle, targets, place)
            except OSError as error:
                reason = error.strerror or str(error)
                raise damaged(self.path, f"byte {place:,}", "a readable file", reason) from error
            if count == 0:
                raise damaged(self.path, "the length", f"{self.known.size:,} bytes", f"{place:,}")
            self.counter.bytes += count
            if count == sum(map(len, targets)):  # nearly always
                return
            place += count
            while targets and count >= len(targets[0]):
                count -= len(targets[0])
                targets = targets[1:]
            targets = [targets[0][count:], *targets[1:]] if targets and count else targets

    def shape(self, name: str) -> tuple[torch.dtype, list[int]] | None:
        """Dtype and shape of a tensor; None if it is not there."""
        found = self._tensors.get(name)
        return None if found is None else found[:2]

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, checked; not for keys and values, which are read page by page.

        Raises:
            DamagedContext: it is not there, or not what was written.
        """
        if name not in self._tensors or name not in self.known.sums:
            raise damaged(self.path, f"tensor {name}", "a tensor of this name", "none")
        dtype, shape, place = self._tensors[name]
        data = self._read(place, dtype.itemsize * int(np.prod(shape, dtype=np.int64)))
        found = checksum(data).hex()
        if found != self.known.sums[name]:
            raise damaged(self.path, f"tensor {name}", f"checksum {self.known.sums[name]}", found)
        if not data:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).view(shape)

    def _page_place(self, layer: int, index: int) -> tuple[int, int]:
        """Where the page's keys and values lie, and how many bytes they are."""
        if layer not in self._places:
            dtype, shape, place = self._tensors[f"kv.{layer}"]
            self._places[layer] = place, dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
        place, size = self._places[layer]
        return place + index * size, size

    def hint(self, layer: int, index: int, count: int = 1) -> None:
        """Say that `count` pages will be read soon: the disk can begin with them, and with others beside
        them."""
        if hasattr(os, "posix_fadvise"):
            place, size = self._page_place(layer, index)
            os.posix_fadvise(self._handle, place, count * size, os.POSIX_FADV_WILLNEED)

    def read_page(self, layer: int, index: int, keys: memoryview, values: memoryview) -> None:
        """Keys and values of the segment's page `index`, checked, into memory of their size.

        Raises:
            DamagedContext: they are not what was written.
        """
        if layer not in self._sums:
            self._sums[layer] = self.tensor(f"sums.{layer}").numpy().tobytes()
        self._read_into([keys, values], self._page_place(layer, index)[0])
        self.counter.pages += 1
        found = checksum(keys, values)
        wanted = self._sums[layer][SUM_BYTES * index : SUM_BYTES * (index + 1)]
        if found != wanted:
            where = f"page {self.known.first_page + index} of layer {layer}"
            raise damaged(self.path, f"{where} (keys and values)", f"checksum {wanted.hex()}", found.hex())

    def layers(self) -> list[int]:
        """The sparse layers in it."""
        return sorted(int(name.removeprefix("kv.")) for name in self._tensors if name.startswith("kv."))

    def verify(self) -> Iterator[int]:
        """Read and check everything; yields the number of bytes behind each piece.

        Raises:
            DamagedContext: the first thing that is not what was written.
        """
        for name in self.known.sums:
            yield as_bytes(self.tensor(name)).size
        for layer in self.layers():
            size = self._page_place(layer, 0)[1]
            data = memoryview(bytearray(size))
            for index in range(self._tensors[f"kv.{layer}"][1][0]):
                self.read_page(layer, index, data[: size // 2], data[size // 2 :])
                yield size


def expected(
    pages: int, keys: Tensor, compressed: Mapping[str, Tensor]
) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Dtype and shape that the tensors of a sparse layer have, by the first part of their names, for a pool
    with these keys (values are like them) and compressed keys."""
    shapes: dict[str, Any] = {"kv": (keys.dtype, [pages, 2, *keys.shape[1:]])}
    shapes |= {name: (x.dtype, [pages, *x.shape[1:]]) for name, x in compressed.items()}
    return shapes | {"sums": (torch.uint8, [pages, SUM_BYTES])}
