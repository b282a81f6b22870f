"""The files of a checkpoint: where they lie, and which weights are in them. No file can run code: pickles
hold tensors only."""

import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from libra.checkpoints import find_checkpoint, hub_errors
from libra.utils.sentences import first_line

# A single file or shards with an index, in the order in which transformers looks for them.
WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
PROJECTOR = "mm_projector.bin"  # next to a base model: what its multimodal pre-training made
NON_LORA = "non_lora_trainables.bin"  # next to an adapter: what was trained in full
_LARGEST_JSON = 64 << 20  # bytes; an index of a very large model has one
_DEEPEST_JSON = 32  # levels of lists and objects; a configuration has four
_FLOAT = re.compile(
    r"b?f(loat)?\d+(_\w+)?", re.IGNORECASE
)  # the floating-point types, as safetensors and torch call them
_SMALL = ("*.json", "*.model", "*.txt", PROJECTOR, NON_LORA, *ADAPTERS)
# Tables that older versions of transformers wrote and every version computes; a tower that is not the one in
# use.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$|\.position_ids$|^model\.vision_tower\.")


class Stored(NamedTuple):
    """A weight as its file describes it."""

    shape: tuple[int, ...]
    dtype: str  # "F32" in a .safetensors file, "float32" in a .bin
    file: Path


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' report on weights, where what is missing comes from other files or is asked for
    afterwards."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def read_json(path: Path) -> dict:
    """The object in a JSON file of a checkpoint.

    Raises:
        ValueError: if the file is missing, too large, nested too deeply or not a JSON object.
    """
    try:
        size = path.stat().st_size
        if not path.is_file() or size > _LARGEST_JSON:
            raise ValueError(f"{path} is not a file of settings (it has {size:,} bytes); download it again")
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise _nested(path) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({first_line(error)}); download it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object; download it again")
    level = [values]
    for _ in range(_DEEPEST_JSON):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
    if level:
        raise _nested(path)
    return values


def _nested(path: Path) -> ValueError:
    return ValueError(
        f"{path} is nested more than {_DEEPEST_JSON} levels deep, as no checkpoint's is; download it again"
    )


def _shards(index: Path) -> list[str]:
    """The names of the files in an index. Raises ValueError for an index that is incomplete or leads out of
    its folder."""
    content = read_json(index)
    places = content.get("weight_map")
    if (
        not isinstance(places, dict)
        or not places
        or not all(isinstance(name, str) for name in places.values())
    ):
        raise ValueError(f"{index} has no weight_map that says where the weights are; download it again")
    if not isinstance(content.get("metadata"), dict):
        raise ValueError(
            f"{index} has no metadata, without which transformers loads nothing; download it again, or add"
            ' "metadata": {} to it'
        )
    names = sorted(set(places.values()))
    away = [name for name in names if Path(name).name != name or name == ".." or set(name) & {"\\", "\0"}]
    if away:
        raise ValueError(
            f"{index} names {away[0]!r}, which is not a file of its own folder; get the checkpoint again"
        )
    return names


def local_folder(name: str, **hub) -> Path:
    """The folder of a model: what :func:`libra.checkpoints.find_checkpoint` finds, or where the hub's files
    of this name are, downloaded unless they are there.

    Args:
        hub: arguments of ``snapshot_download``, such as ``revision``, ``cache_dir`` and ``token``.

    Raises:
        ValueError: if there is no such folder and the hub has no such model or is out of reach.
    """
    name = find_checkpoint(name)
    if Path(name).is_dir():
        return Path(name)
    with hub_errors(name):
        folder = Path(snapshot_download(name, allow_patterns=list(_SMALL), **hub))
        for single, index in WEIGHTS:  # one format is enough
            wanted = _shards(folder / index) if (folder / index).is_file() else [single]
            snapshot_download(name, allow_patterns=wanted, **hub)
            if all((folder / file).is_file() for file in wanted):
                break
    return folder


def has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for names in WEIGHTS for name in names)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights.

    Raises:
        ValueError: if there are none, or a shard that the index names is missing.
    """
    for single, index in WEIGHTS:
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            files = [folder / name for name in _shards(folder / index)]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise ValueError(
                    f"{folder} lacks {missing[0]}, one of the {len(files)} shards that {index} names;"
                    " download it again"
                )
            return files
    known = ", ".join(name for names in WEIGHTS for name in names)
    raise ValueError(f"{folder} holds no weights (none of {known}); download them")


def _damaged(path: Path, reason: Exception | str) -> ValueError:
    """What to raise for a file that does not open."""
    if not os.access(path, os.R_OK):
        return ValueError(f"{path} cannot be read; see to its permissions")
    with path.open("rb") as file:
        if file.read(24) == b"version https://git-lfs.":
            return ValueError(
                f"{path} is Git LFS's note on where the weights are; fetch them with git lfs pull"
            )
    reason = reason if isinstance(reason, str) else first_line(reason)
    return ValueError(f"{path} is damaged ({reason}); download it again")


def read_bin(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a ``.bin`` file, mapped into memory; nothing in the file is run.

    Raises:
        ValueError: if the file is damaged or holds anything but tensors under names.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on the pickle's protocol
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted is None:
            raise _damaged(path, "no file of weights") from error
        raise ValueError(
            f"{path} is not opened: it asks for {wanted[1]}, which could run code, and weights need tensors "
            "only; get a copy of the checkpoint that you trust, best as safetensors"
        ) from error
    except Exception as error:  # a damaged pickle raises anything
        raise _damaged(path, error) from error
    tensors = isinstance(values, dict) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in values.items()
    )
    if not tensors:
        raise ValueError(
            f"{path} holds something other than tensors under their names, so it is not a file of weights"
        )
    return values


def read_shapes(path: Path) -> dict[str, Stored]:
    """Names, shapes and types in a ``.safetensors`` or ``.bin`` file, without reading the weights.

    Raises:
        ValueError: if the file is damaged, or a pickle of more than tensors.
    """
    if path.suffix == ".bin":
        return {name: stored_as(value, path) for name, value in read_bin(path).items()}
    try:
        with safe_open(path, "pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}
            return {
                name: Stored(tuple(part.get_shape()), part.get_dtype(), path) for name, part in parts.items()
            }
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error


def stored_as(value: torch.Tensor, file: Path) -> Stored:
    return Stored(tuple(value.shape), str(value.dtype).removeprefix("torch."), file)


def stored_in(folder: Path) -> dict[str, Stored]:
    """:func:`read_shapes` of all the files with a model's weights, under the names that :func:`model_name`
    gives."""
    return {
        model_name(name): weight
        for file in weight_files(folder)
        for name, weight in read_shapes(file).items()
    }


def model_name(name: str) -> str:
    """The name that a published vision tower's weight has in the model: current transformers have one level
    less."""
    return name.replace(".vision_tower.vision_model.", ".vision_tower.")


def read_additions(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of ``mm_projector.bin`` or ``non_lora_trainables.bin`` under the model's names.

    They were written from inside peft's wrapper, ``base_model.model.…``, or from the bare model.
    """
    values = {name.removeprefix("base_model."): value for name, value in read_bin(path).items()}
    if any(name.startswith("model.model.") for name in values):
        values = {name.removeprefix("model."): value for name, value in values.items()}
    return {model_name(name): value for name, value in values.items()}


def check_weights(owner: str, expected: Mapping[str, torch.Tensor], stored: Mapping[str, Stored]) -> None:
    """Compare the weights that a model has with those that there are; a warning names what is left over.

    Args:
        owner: what to call the checkpoint.
        expected: the model's state dict, on any device.

    Raises:
        ValueError: if weights are missing, have other shapes, or are not floating-point numbers.
    """
    missing = [name for name in expected if name not in stored]
    if missing:
        raise ValueError(
            f"{owner} lacks {len(missing)} weights, {missing[0]!r} among them; download it again"
        )
    for name, value in expected.items():
        if stored[name].shape != tuple(value.shape):
            raise ValueError(
                f"{stored[name].file} holds {name!r} in the shape {stored[name].shape}, and config.json asks "
                f"for {tuple(value.shape)}; take both from the same checkpoint"
            )
        check_dtype(name, stored[name])
    unknown = [name for name in stored if name not in expected and not _IGNORED.search(name)]
    if unknown:
        warnings.warn(
            f"{owner} has {len(unknown)} weights that its model lacks, {unknown[0]!r} among them",
            stacklevel=2,
        )


def is_float(dtype: str) -> bool:
    """Whether a type, as safetensors or torch call it, is one of floating-point numbers."""
    return _FLOAT.fullmatch(dtype) is not None


def check_dtype(name: str, weight: Stored) -> None:
    """Raises ValueError for a weight that is not of a floating-point type."""
    if not is_float(weight.dtype):
        raise ValueError(
            f"{weight.file} holds {name!r} as {weight.dtype}, and weights are floating-point numbers; get"
            " the checkpoint again"
        )


def check_finite(owner: str, model: torch.nn.Module) -> None:
    """Look through a loaded model's weights; those that are not in memory (device "meta") are left out.

    Raises:
        ValueError: if one is not a number, or infinite.
    """
    for name, value in model.named_parameters():
        if value.is_meta or not value.is_floating_point() or not value.numel():
            continue
        if not all(bool(edge.isfinite()) for edge in value.detach().aminmax()):
            raise ValueError(
                f"{owner} holds values in {name!r} that are not numbers or infinite; get the checkpoint "
                "again (weights that were written in bfloat16 can be too large for float16: load them in "
                "bfloat16)"
            )
