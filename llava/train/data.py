"""Training samples: read and checked once, made into tensors when they are needed, put together into batches."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler
from transformers.utils import logging

from libra.media import FILES, open_image

from ..constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from ..conversation import Conversation, SeparatorStyle
from ..mm_utils import process_images
from ..model.anyres import arrange_tiles
from ..video import DEFAULT_VIDEO_TOKEN, process_image, process_video
from .labels import Turn, encode, place_images

logger = logging.get_logger(__name__)
LOOKED_FOR = 100  # samples whose files must not all be missing before a training begins


def read_samples(path: str) -> list[dict]:
    """The samples of a JSON list, or of a ``.jsonl`` file with one in each line.

    Raises:
        ValueError: with the line at fault.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"the data {path} cannot be read ({reason}); give the path of a JSON file") from error
    try:
        if not path.endswith(".jsonl"):
            samples = json.loads(text)
        else:
            samples = []
            for number, line in enumerate(text.splitlines(), 1):
                if line.strip():
                    samples.append(_json_line(path, number, line))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: no valid JSON ({error.msg}); correct it") from error
    if not isinstance(samples, list) or not samples:
        raise ValueError(f"{path} holds no list of samples; it should begin with [{{\"conversations\": …")
    return samples


def _json_line(path: str, number: int, line: str) -> dict:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}: no valid JSON ({error.msg}); correct it") from error


def check_samples(
    samples: list[dict], path: str, template: Conversation | None, image_folder: str, video_folder: str
) -> None:
    """Look through all samples before a model is loaded or downloaded.

    Raises:
        ValueError: with the number and id of the first sample that is not as it should be.
    """
    plain = template is not None and template.sep_style is SeparatorStyle.PLAIN
    folders = {"image": image_folder, "video": video_folder}
    for number, sample in enumerate(samples):
        problem = _problem(sample, plain)
        if problem:
            name = f" (id {sample['id']!r})" if isinstance(sample, dict) and "id" in sample else ""
            raise ValueError(f"{path}, sample {number}{name}: {problem}")
        for kind in [kind for kind in folders if kind in sample]:
            folder = Path(folders.pop(kind))
            if not folder.is_dir():
                raise ValueError(f"{path} names {kind}s and there is no folder {folder}; give it as --{kind}_folder")
    for kind, folder in (("image", image_folder), ("video", video_folder)):
        first = [name for sample in samples[:LOOKED_FOR] for name in _files(sample, kind)]
        if first and not any((Path(folder) / name).exists() for name in first):
            raise ValueError(f"none of the {kind}s that {path} names first lies in {folder}, {first[0]} for one;"
                             f" --{kind}_folder is what their names begin at")


def _files(sample: dict, kind: str) -> list[str]:
    given = sample.get(kind, [])
    return [given] if isinstance(given, str) else given


def _problem(sample, plain: bool) -> str | None:
    if not isinstance(sample, dict) or not isinstance(sample.get("conversations"), list):
        return 'it has no list "conversations"'
    turns = sample["conversations"]
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("from") not in ("human", "gpt") or not isinstance(turn.get("value"), str):
            return 'a turn needs "from" (human or gpt) and "value" (a text)'
    speakers = [turn["from"] for turn in turns]
    if speakers[:1] == ["gpt"]:
        turns, speakers = turns[1:], speakers[1:]
    if not any(turn["from"] == "gpt" and turn["value"] for turn in turns):
        return "the conversation has no answer (a turn from gpt behind one from human)"
    if speakers != [("human", "gpt")[i % 2] for i in range(len(speakers))]:
        return "human and gpt do not take turns"
    if plain and len(turns) != 2:
        return f"the version plain takes one question and one answer, not {len(turns)} turns"
    return _problem_of_pictures(sample, turns, plain)


def _problem_of_pictures(sample: dict, turns: list[dict], plain: bool) -> str | None:
    if "video" in sample and "image" in sample:
        return "it has both image and video; make it two samples"
    for kind in ("image", "video"):
        given = sample.get(kind, "")
        if not isinstance(given, str) and not (isinstance(given, list) and given and all(isinstance(f, str) for f in given)):
            return f'"{kind}" is no file name and no list of them'
        token = DEFAULT_IMAGE_TOKEN if kind == "image" else DEFAULT_VIDEO_TOKEN
        places = [turn["value"].count(token) for turn in turns]
        if isinstance(given, list) and (plain or sum(places) != len(given)):
            return f"it has {len(given)} {kind}s and {sum(places)} {token}; give one for each"
        if isinstance(given, str) and kind in sample and sum(map(bool, places)) > 1:
            return f"it has one {kind} and {token} in several turns; give a list of {kind}s"
    return None


@dataclass
class LazySupervisedDataset(Dataset):
    """Samples as tensors: ``input_ids``, ``labels`` (S,), and ``images``, ``image_sizes`` (width, height), one for each place.

    A sample without images has an image of zeros. One whose file cannot be read has one too and no labels: it keeps its place
    in the batch, takes no part in the loss, and counts as ``skipped``. ``mismatched``: see :class:`~.labels.Encoded`.

    Args:
        template: what ``training_template`` returned.
        pictures: ``image_aspect_ratio`` and ``image_grid_pinpoints``.
        num_frames: of a video, for a model that takes videos, whose pixels are pairs; None for other models.
        limit: the tokenizer's ``model_max_length``.
        visual_tokens: of the model, where images may be so narrow that none are left.
        said: remarks about images that were made.
    """

    samples: list[dict]
    tokenizer: object
    template: Conversation | None
    image_processor: object
    pictures: SimpleNamespace
    image_folder: str
    video_folder: str
    limit: int
    num_frames: int | None = None
    start_end: bool = False
    visual_tokens: "VisualTokens | None" = None
    said: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def modality_lengths(self) -> list[int]:
        """Each sample's words; negative for a sample without images."""
        counts = [sum(len(turn["value"].split()) for turn in sample["conversations"]) for sample in self.samples]
        return [n if "image" in sample or "video" in sample else -n for n, sample in zip(counts, self.samples)]

    def __getitem__(self, index: int) -> dict:
        sample = self.samples[index]
        turns: list[Turn] = [(turn["from"], turn["value"]) for turn in sample["conversations"]]
        files = sample.get("image", sample.get("video"))
        if files is not None:
            turns = place_images(turns, self.template, isinstance(files, list), self.start_end)
        encoded = encode(turns, self.template, self.tokenizer, files is not None, self.limit)
        names = [] if files is None else [files] if isinstance(files, str) else files
        skipped = False
        try:
            pictures = [self._video(name) if "video" in sample else self._image(name) for name in names]
        except ValueError as error:
            logger.warning(f"sample {index} is skipped: {error}")
            pictures, skipped = [self._nothing()] * len(names), True
            encoded.labels = torch.full_like(encoded.labels, IGNORE_INDEX)
        images, sizes = zip(*(pictures or [self._nothing()]))
        return {
            "input_ids": encoded.input_ids, "labels": encoded.labels, "images": list(images), "image_sizes": list(sizes),
            "skipped": skipped, "mismatched": encoded.mismatch,
        }

    def _image(self, name: str):
        image = open_image(Path(self.image_folder) / name, FILES, say=self._say_once)
        aspect = self.pictures.image_aspect_ratio
        if self.num_frames is not None:
            return (process_image(image, self.image_processor, aspect), "image"), image.size
        pixels = process_images([image], self.image_processor, self.pictures)[0]
        size = (max(image.size),) * 2 if aspect == "pad" else image.size
        if self.visual_tokens is not None:
            self.visual_tokens(pixels, size)  # refuses an image without any
        return pixels, size

    def _say_once(self, what: str, remark: str) -> None:
        """A data set may have a million transparent images."""
        if remark not in self.said:
            self.said.add(remark)
            logger.warning(f"{what} {remark} (said once)")

    def _video(self, name: str):
        aspect = self.pictures.image_aspect_ratio
        pixels = process_video(
            str(Path(self.video_folder) / name), self.image_processor, aspect_ratio=aspect, num_frames=self.num_frames
        )
        return (pixels, "video"), (pixels.shape[3], pixels.shape[2])

    def _nothing(self):
        """An image of zeros; with tiles it takes their way through the model, so that every rank uses the same weights."""
        crop = self.image_processor.crop_size
        size, pixels = (crop["width"], crop["height"]), torch.zeros(3, crop["height"], crop["width"])
        if self.num_frames is not None:
            return (pixels[None], "image"), size
        return (pixels[None] if self.pictures.image_aspect_ratio == "anyres" else pixels), size


@dataclass(frozen=True)
class VisualTokens:
    """How many visual tokens an image becomes, from numbers alone (``patches`` a picture, ``edge`` its pixels)."""

    patches: int
    edge: int
    merge: str = "flat"
    pinpoints: str | list | None = None

    def __call__(self, pixels: torch.Tensor, size: tuple[int, int]) -> int:
        tiles = torch.empty(1 if pixels.ndim == 3 else len(pixels), self.patches, 1, device="meta")
        newline = torch.empty(1, device="meta")
        return len(arrange_tiles(tiles, self.merge, size, self.pinpoints, self.edge, newline))


@dataclass
class Collator:
    """Samples to a batch, padded on the right, with text cut at ``limit`` tokens and the images of what was cut left out.

    With ``visual_tokens`` an image counts as many tokens as it becomes: the model would cut there as well, but then labels
    would be counted that nobody learns from. ``skipped`` and ``mismatched`` are numbers of samples.
    """

    pad_token_id: int
    limit: int
    placeholders: tuple[int, ...]
    visual_tokens: VisualTokens | None = None

    def __call__(self, samples: list[dict]) -> dict:
        rows = [self._cut(sample) for sample in samples]
        images = [image for _, row_images, _ in rows for image in row_images]
        ids = [sample["input_ids"][:length] for sample, (length, _, _) in zip(samples, rows)]
        labels = [sample["labels"][:length] for sample, (length, _, _) in zip(samples, rows)]
        alike = all(isinstance(image, torch.Tensor) for image in images) and len({image.shape for image in images}) == 1
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
            "attention_mask": pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in ids], batch_first=True),
            "images": torch.stack(images) if alike else images,
            "image_sizes": [size for _, _, sizes in rows for size in sizes],
            "skipped": sum(sample["skipped"] for sample in samples),
            "mismatched": sum(sample["mismatched"] for sample in samples),
        }

    def _cut(self, sample: dict) -> tuple[int, list, list]:
        """How many ids stay, and the images and sizes that belong to them; a row without places keeps one image."""
        ids, images, sizes = sample["input_ids"].tolist(), sample["images"], sample["image_sizes"]
        used = places = length = 0
        for token in ids:
            if used >= self.limit:
                break
            held = token in self.placeholders
            used += self.visual_tokens(images[places], sizes[places]) if held and self.visual_tokens else 1
            places += held
            length += 1
        return length, images[: places or 1], sizes[: places or 1]


class ModalityLengthSampler(Sampler):
    """Every sample once an epoch, in random order, but samples of one step are of one kind and of like length.

    Args:
        lengths: ``modality_lengths`` of the data.
        step: samples of one step, over all processes.
        seed: with the epoch it gives the order.
    """

    def __init__(self, lengths: list[int], step: int, seed: int):
        self.lengths, self.step, self.seed, self.epoch = lengths, step, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        shuffled = torch.randperm(len(self.lengths), generator=generator).tolist()
        steps, rest = [], []
        for with_images in (True, False):
            kind = [i for i in shuffled if (self.lengths[i] > 0) == with_images]
            whole = len(kind) - len(kind) % self.step
            steps += [kind[start : start + self.step] for start in range(0, whole, self.step)]
            rest += kind[whole:]
        order = torch.randperm(len(steps), generator=generator).tolist()
        for step in [*(steps[i] for i in order), rest]:
            yield from sorted(step, key=lambda i: -abs(self.lengths[i]))
