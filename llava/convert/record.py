"""What a llava-hf folder notes down of the original it was made from, so that the way back gives the same
files.

The folder ``original/`` holds copies of the small files, the headers of the weight files, and those few
tensors that the llava-hf folder has no use for. All others are those of the llava-hf folder.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from libra.identity import file_digest

from ..model.weights import read_json
from .folder import small_files, write_json
from .keys import EMBEDDINGS, HEAD, held_from_original, held_from_tower, is_buffer
from .weights import INDEX, Stored, WeightFile, entries_of, header_of, index_of, read_safetensors, write_files

FOLDER = "original"
_LEFT_OVER = "left_over.safetensors"
_MOST_LEFT_OVER = 64 << 20  # bytes of a whole CLIP's text model that are kept; a published one's is larger


@dataclass(frozen=True)
class Part:
    """Of an original: ``name`` is "checkpoint" or "tower"; ``files`` are empty where the weights are in the
    other part."""

    name: str
    folder: Path
    files: list[WeightFile]

    @property
    def tensors(self) -> dict[str, Stored]:
        """By the names of transformers' class; what it has no place for is left out."""
        found = {held(self.name, key): stored for file in self.files for key, stored in file.tensors.items()}
        return {name: stored for name, stored in found.items() if name is not None}

    @property
    def complete(self) -> bool:
        """Whether all its weights can be had again: a whole CLIP has a text model too, kept where it is
        small."""
        sizes = (
            stored.nbytes
            for file in self.files
            for key, stored in file.tensors.items()
            if held(self.name, key) is None and not is_buffer(key)
        )
        return sum(sizes) <= _MOST_LEFT_OVER


def held(part: str, key: str) -> str | None:
    """The name that transformers' class has for a weight of a part; None for a buffer and for what a tower
    has besides."""
    if is_buffer(key):
        return None
    return held_from_original(key) if part == "checkpoint" else held_from_tower(key)


def write_record(stage: Path, parts: list[Part], tensors: dict[str, Stored], tower_name: str) -> None:
    """Note down the originals of the llava-hf folder ``stage`` of these tensors; its config.json is there
    already."""
    folder = stage / FOLDER
    weights, left = {}, {}
    for part in parts:
        (folder / part.name).mkdir(parents=True)
        for path in small_files(part.folder):
            if not path.name.endswith(".bin.index.json"):
                shutil.copyfile(path, folder / part.name / path.name)
        if not part.complete:
            continue
        if (
            len(part.files) > 1 and not (part.folder / INDEX).is_file()
        ):  # .bin shards, which come back as safetensors
            write_json(folder / part.name / INDEX, index_of({file.name: file.tensors for file in part.files}))
        for file in part.files:
            weights[f"{part.name}/{file.name}"] = file.header.decode()
            for key, stored in file.tensors.items():
                used = tensors.get(held(part.name, key))
                if used is not stored and (
                    used is None or not stored.same(used)
                ):  # a buffer, a text model, or a tower that lies twice
                    left[f"{part.name}/{key}"] = stored
    if left:
        write_files(folder, {_LEFT_OVER: (header_of(left), left)})
    layout = {"config": file_digest(stage / "config.json"), "vision_tower": tower_name, "weights": weights}
    write_json(folder / "layout.json", {**layout, "own_tower": bool(parts[1].files)})


@dataclass(frozen=True)
class Record:
    """What :func:`write_record` wrote, with the weights of the folder it lies in."""

    folder: Path
    tower_name: str
    own_tower: bool  # whether the tower's weights are in files of their own
    files: dict[str, bytes]  # "part/file" to header
    tensors: dict[str, dict[str, Stored]]  # the same to its tensors

    @property
    def lacks_tower(self) -> bool:
        """Whether the tower's file cannot be had again: it was a whole CLIP, of which the llava-hf folder has
        a part."""
        return self.own_tower and not any(place.startswith("tower/") for place in self.files)

    @property
    def tower_place(self) -> str:
        """Where the tower goes in the new checkpoint; one that lay elsewhere moves in."""
        path = PurePosixPath(self.tower_name)
        return "vision_tower" if path.is_absolute() or ".." in path.parts else self.tower_name

    def write(self, stage: Path) -> None:
        """The original's files; the configuration changes only where the tower moved in."""
        targets = {"checkpoint": stage, "tower": stage / self.tower_place}
        for part, target in targets.items():
            target.mkdir(parents=True, exist_ok=True)
            for path in small_files(self.folder / part):
                shutil.copyfile(path, target / path.name)
        for part, target in targets.items():
            places = [place for place in self.files if place.startswith(f"{part}/")]
            write_files(
                target, {place.split("/")[1]: (self.files[place], self.tensors[place]) for place in places}
            )
        if self.tower_place != self.tower_name:
            write_json(
                stage / "config.json",
                {**read_json(stage / "config.json"), "mm_vision_tower": self.tower_place},
            )


def read_record(source: Path, tensors: dict[str, Stored]) -> Record | None:
    """The record of a llava-hf folder with these weights; None if there is none or the model is another by
    now.

    Raises:
        ValueError: if the record is damaged.
    """
    path = source / FOLDER / "layout.json"
    if not path.is_file():
        return None
    try:
        return _read_record(source, read_json(path), tensors)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}); remove {path.parent} to convert without it"
        ) from error


def _read_record(source: Path, layout: dict, tensors: dict[str, Stored]) -> Record | None:
    if layout["config"] != file_digest(source / "config.json"):
        return None
    left = source / FOLDER / _LEFT_OVER
    buffers = read_safetensors(left).tensors if left.is_file() else {}
    files, found = {}, {}
    for place, text in layout["weights"].items():
        part = place.split("/")[0]
        files[place], found[place] = text.encode(), {}
        for key, entry in entries_of(files[place]).items():
            name = held(part, key)
            stored = buffers.get(f"{part}/{key}") or tensors.get(name)
            if stored is not None and name in (EMBEDDINGS, HEAD) and stored.shape[0] > entry["shape"][0]:
                stored = stored.cut(entry["shape"][0])  # without the row of <image>
            start, stop = entry["data_offsets"]
            noted = entry["dtype"], entry["shape"], stop - start
            if stored is None or (stored.dtype, list(stored.shape), stored.nbytes) != noted:
                return None
            found[place][key] = stored
    return Record(source / FOLDER, layout["vision_tower"], layout["own_tower"], files, found)
