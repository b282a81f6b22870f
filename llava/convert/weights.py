"""Weight files, read and written tensor by tensor: safetensors byte by byte, `.bin` with torch's loader for
plain tensors."""

import json
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path

import torch
from tqdm import tqdm

from ..model.weights import read_bin, weight_files
from .folder import write_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PIECE = 1 << 24  # bytes read at once
INDEX = "model.safetensors.index.json"


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    return math.prod(shape) * DTYPES[dtype].itemsize


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. Its type (safetensors' name) and shape are known; ``pieces`` reads its bytes."""

    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[bytes]]

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.shape)

    def same(self, other: "Stored") -> bool:
        """Whether both are the same, bit by bit."""
        alike = (self.dtype, self.shape) == (other.dtype, other.shape)
        return alike and all(mine == theirs for mine, theirs in zip_longest(self.pieces(), other.pieces()))

    def grown(self, rows: int) -> "Stored":
        """A matrix with rows added that are the mean of the others, taken in float64."""
        dtype, width = DTYPES[self.dtype], self.shape[1]

        def pieces():
            total, rest = torch.zeros(width, dtype=torch.float64), b""
            for piece in self.pieces():
                yield piece
                rest += piece
                whole = len(rest) // (width * dtype.itemsize) * (width * dtype.itemsize)
                total += (
                    torch.frombuffer(bytearray(rest[:whole]), dtype=dtype).view(-1, width).double().sum(0)
                )
                rest = rest[whole:]
            mean = (total / self.shape[0]).to(dtype)
            yield mean.expand(rows, -1).contiguous().view(torch.uint8).numpy().tobytes()

        return replace(self, shape=(self.shape[0] + rows, width), pieces=pieces)

    def cut(self, rows: int) -> "Stored":
        """Only the first rows."""
        first = replace(self, shape=(rows, *self.shape[1:]))

        def pieces():
            left = first.nbytes
            for piece in self.pieces():
                yield piece[:left]
                left -= len(piece[:left])
                if not left:
                    return

        return replace(first, pieces=pieces)


@dataclass(frozen=True)
class WeightFile:
    """A weight file: what a safetensors file begins with (for a `.bin`, what one would begin with), and its
    tensors."""

    name: str
    header: bytes
    tensors: dict[str, Stored]


def header_of(tensors: dict[str, Stored]) -> bytes:
    """The JSON that a safetensors file of these tensors begins with, without its length."""
    entries, start = {"__metadata__": {"format": "pt"}}, 0
    # Wide types first, as the library does it: then every tensor lies at a multiple of its item's size.
    for name, stored in sorted(tensors.items(), key=lambda item: -DTYPES[item[1].dtype].itemsize):
        entries[name] = {
            "dtype": stored.dtype,
            "shape": list(stored.shape),
            "data_offsets": [start, start + stored.nbytes],
        }
        start += stored.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8)


def entries_of(header: bytes) -> dict[str, dict]:
    """A header's tensors in the order of their bytes."""
    entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
    return dict(sorted(entries.items(), key=lambda item: item[1]["data_offsets"]))


def write_files(folder: Path, files: dict[str, tuple[bytes, dict[str, Stored]]]) -> None:
    """Write safetensors files, by their names, with these headers; the tensors have the types and shapes
    these tell."""
    total = sum(stored.nbytes for _, tensors in files.values() for stored in tensors.values())
    with tqdm(
        total=total, desc="weights", unit="B", unit_scale=True, mininterval=0.5, disable=not total
    ) as bar:
        for name, (header, tensors) in files.items():
            with (folder / name).open("wb") as file:
                file.write(struct.pack("<Q", len(header)) + header)
                for key in entries_of(header):
                    for piece in tensors[key].pieces():
                        file.write(piece)
                        bar.update(len(piece))


def write_folder(folder: Path, tensors: dict[str, Stored], max_shard_size: int) -> int:
    """Write tensors as one safetensors file or as several with an index; returns how many files."""
    shards: list[dict[str, Stored]] = [{}]
    size = 0
    for name, stored in tensors.items():
        if shards[-1] and size + stored.nbytes > max_shard_size:
            shards.append({})
            size = 0
        shards[-1][name] = stored
        size += stored.nbytes
    count = len(shards)
    names = (
        [f"model-{k:05}-of-{count:05}.safetensors" for k in range(1, count + 1)]
        if count > 1
        else ["model.safetensors"]
    )
    write_files(folder, {name: (header_of(shard), shard) for name, shard in zip(names, shards)})
    if count > 1:
        write_json(folder / INDEX, index_of(dict(zip(names, shards))))
    return count


def index_of(shards: dict[str, dict[str, Stored]]) -> dict:
    """What an index file says of weight files, by their names."""
    total = sum(stored.nbytes for shard in shards.values() for stored in shard.values())
    places = {tensor: name for name, shard in shards.items() for tensor in shard}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


def read_folder(folder: Path) -> list[WeightFile]:
    """A checkpoint's weight files: safetensors where it has them, else `.bin`, whole or in shards.

    Raises:
        ValueError: if there are none, or one is missing or damaged.
    """
    files = weight_files(folder)
    return [_read_bin(path) if path.suffix == ".bin" else read_safetensors(path) for path in files]


def read_safetensors(path: Path) -> WeightFile:
    """Raises ValueError if the file is damaged or cut short."""
    with path.open("rb") as file:
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("its header is cut short")
            header = file.read(length)
            entries = entries_of(header)
            unknown = {entry["dtype"] for entry in entries.values()} - DTYPES.keys()
            for name, entry in entries.items():
                start, stop = entry["data_offsets"]
                if not unknown and nbytes(entry["dtype"], entry["shape"]) != stop - start:
                    raise ValueError(f"its header contradicts itself about {name!r}")
            end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
            if 8 + length + end != path.stat().st_size:
                raise ValueError(
                    f"it has {path.stat().st_size} bytes and its header tells of {8 + length + end}"
                )
        except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise ValueError(f"{path} is damaged ({error}); get it again") from error
    if unknown:
        raise ValueError(
            f"{path} has tensors of type {', '.join(sorted(unknown))}; convert the unquantised checkpoint"
        )

    def stored(entry: dict) -> Stored:
        start, stop = entry["data_offsets"]

        def pieces():
            with path.open("rb") as file:
                file.seek(8 + length + start)
                for at in range(0, stop - start, _PIECE):
                    yield file.read(min(_PIECE, stop - start - at))

        return Stored(entry["dtype"], tuple(entry["shape"]), pieces)

    return WeightFile(path.name, header, {name: stored(entry) for name, entry in entries.items()})


@lru_cache(maxsize=1)  # files that torch cannot map are held one at a time
def _tensors_in(path: Path, changed: int) -> dict[str, torch.Tensor]:
    return read_bin(path)


def forget() -> None:
    """Let go of what was read last."""
    _tensors_in.cache_clear()


def _read_bin(path: Path) -> WeightFile:
    changed = path.stat().st_mtime_ns

    def pieces(name: str) -> Iterator[bytes]:
        data = _tensors_in(path, changed)[name].contiguous().flatten().view(torch.uint8).numpy()
        for at in range(0, len(data), _PIECE):
            yield data[at : at + _PIECE].tobytes()

    tensors = {}
    for name, value in _tensors_in(path, changed).items():
        if value.dtype not in _NAMES:
            raise ValueError(f"{path} has {name!r} of type {value.dtype}; convert the unquantised checkpoint")
        tensors[name] = Stored(_NAMES[value.dtype], tuple(value.shape), lambda name=name: pieces(name))
    safe = path.name.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors"
    return WeightFile(safe, header_of(tensors), tensors)
