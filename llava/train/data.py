"""Training samples as tensors, made when they are needed, and put together into batches."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler
from transformers.utils import logging

from libra.media import FILES, open_image

from ..constants import IGNORE_INDEX
from ..conversation import Conversation
from ..mm_utils import process_images
from ..model.anyres import arrange_tiles
from ..video import process_image, process_video
from .labels import Encoded, Turn, encode, place_images
from .outcomes import Outcome
from .samples import files_of

logger = logging.get_logger(__name__)


@dataclass
class LazySupervisedDataset(Dataset):
    """Samples as tensors: ``input_ids``, ``labels`` (S,), and ``images``, ``image_sizes`` (width, height),
    one for each place.

    A sample without images has an image of zeros. One whose file cannot be read has one too and no labels: it
    keeps its place in the batch and takes no part in the loss; ``unreadable`` says why. ``mismatched`` and
    ``cut``: see :class:`~.labels.Encoded`. ``place`` is the sample's in ``samples``.

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
        counts = [
            sum(len(turn["value"].split()) for turn in sample["conversations"]) for sample in self.samples
        ]
        return [
            n if "image" in sample or "video" in sample else -n for n, sample in zip(counts, self.samples)
        ]

    def encoded(self, index: int) -> Encoded:
        """Ids and labels, without a look at the images."""
        sample = self.samples[index]
        turns: list[Turn] = [(turn["from"], turn["value"]) for turn in sample["conversations"]]
        files = sample.get("image", sample.get("video"))
        if files is not None:
            turns = place_images(turns, self.template, isinstance(files, list), self.start_end)
        return encode(turns, self.template, self.tokenizer, files is not None, self.limit)

    def __getitem__(self, index: int) -> dict:
        sample, encoded, unreadable = self.samples[index], self.encoded(index), ""
        names = [name for kind in ("image", "video") for name in files_of(sample, kind)]
        try:
            pictures = [self._video(name) if "video" in sample else self._image(name) for name in names]
        except ValueError as error:
            unreadable = str(error)
            logger.warning(f"sample {sample.get('number', index)} is skipped: {error}")
            pictures = [self._nothing()] * len(names)
            encoded.labels = torch.full_like(encoded.labels, IGNORE_INDEX)
        images, sizes = zip(*(pictures or [self._nothing()]))
        return {
            "input_ids": encoded.input_ids,
            "labels": encoded.labels,
            "images": list(images),
            "image_sizes": list(sizes),
            "place": index,
            "unreadable": unreadable,
            "mismatched": encoded.mismatch,
            "cut": encoded.cut,
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
            str(Path(self.video_folder) / name),
            self.image_processor,
            aspect_ratio=aspect,
            num_frames=self.num_frames,
        )
        return (pixels, "video"), (pixels.shape[3], pixels.shape[2])

    def _nothing(self):
        """An image of zeros; with tiles it takes their way through the model, so that every rank uses the
        same weights."""
        crop = self.image_processor.crop_size
        size, pixels = (crop["width"], crop["height"]), torch.zeros(3, crop["height"], crop["width"])
        if self.num_frames is not None:
            return (pixels[None], "image"), size
        return (pixels[None] if self.pictures.image_aspect_ratio == "anyres" else pixels), size


@dataclass(frozen=True)
class VisualTokens:
    """How many visual tokens an image becomes, from numbers only (``patches`` a picture, ``edge`` its
    pixels)."""

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
    """Samples to a batch, padded on the right, with text cut at ``limit`` tokens and the images of what was
    cut left out.

    With ``visual_tokens`` an image counts as many tokens as it becomes: the model would cut there as well,
        but then labels
    would be counted that nobody learns from. ``outcomes`` says of each sample what
    :meth:`.outcomes.Tally.add` takes.
    """

    pad_token_id: int
    limit: int
    placeholders: tuple[int, ...]
    visual_tokens: VisualTokens | None = None

    def __call__(self, samples: list[dict]) -> dict:
        rows = [self._cut(sample) for sample in samples]
        images = [image for row in rows for image in row.images]
        ids = [sample["input_ids"][: row.length] for sample, row in zip(samples, rows)]
        labels = [sample["labels"][: row.length] for sample, row in zip(samples, rows)]
        alike = (
            all(isinstance(image, torch.Tensor) for image in images)
            and len({image.shape for image in images}) == 1
        )
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
            "attention_mask": pad_sequence(
                [torch.ones_like(row, dtype=torch.bool) for row in ids], batch_first=True
            ),
            "images": torch.stack(images) if alike else images,
            "image_sizes": [size for row in rows for size in row.sizes],
            "outcomes": [
                (sample["place"], _outcome(sample, row.cut, mine), sample["unreadable"])
                for sample, row, mine in zip(samples, rows, labels)
            ],
        }

    def outcome(self, sample: dict) -> Outcome:
        """What will become of a sample of the data set."""
        row = self._cut(sample)
        return _outcome(sample, row.cut, sample["labels"][: row.length])

    def _cut(self, sample: dict) -> "_Row":
        """What stays; a row without places keeps one image."""
        ids, images, sizes = sample["input_ids"].tolist(), sample["images"], sample["image_sizes"]
        used = places = length = 0
        for token in ids:
            if used >= self.limit:
                break
            held = token in self.placeholders
            used += self.visual_tokens(images[places], sizes[places]) if held and self.visual_tokens else 1
            places += held
            length += 1
        cut = sample["cut"] or length < len(ids) or used > self.limit
        return _Row(length, images[: places or 1], sizes[: places or 1], cut)


class _Row(NamedTuple):
    """What stays of a sample: its first ``length`` ids and the images that belong to them."""

    length: int
    images: list
    sizes: list
    cut: bool


def _outcome(sample: dict, cut: bool, labels: torch.Tensor) -> Outcome:
    if sample["unreadable"]:
        return Outcome.UNREADABLE
    if bool((labels != IGNORE_INDEX).any()):
        return Outcome.CUT if cut else Outcome.USED
    return Outcome.BEHIND if cut and not sample["mismatched"] else Outcome.MISMATCHED


class ModalityLengthSampler(Sampler):
    """Every sample once an epoch, in random order, but samples of one step are of one kind and of like
    length.

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
