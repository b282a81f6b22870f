"""The lmms-eval model ``libra``: a vision-language model with the compression that a table row's YAML names.

python -m libra.lmms --model_args config=mini/r50 --tasks mini_reading
"""

import json
import math
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from lmms_eval.api.model import lmms
from PIL import Image

from libra.checkpoints import find_reachable
from libra.identity import checkpoint_identity, code_identity, digest, row_identity
from libra.media import BROKEN, is_picture, open_image
from libra.rows import Row, get_model
from libra.utils.devices import rank_device
from llava.video import load_frames

from .models_base import Engine, Sample
from .samples import SampleLog


def blinded(visual):
    """A picture, or the list of a video's frames, in grey: what the blind row is shown."""
    if isinstance(visual, list):
        return [blinded(frame) for frame in visual]
    return Image.new("RGB", visual.size, (127, 127, 127))


class _Request(NamedTuple):
    place: int  # in the harness's list
    task: str
    doc_id: int
    text: str
    doc_to_visual: Callable
    split: str
    options: dict

    @property
    def name(self) -> str:
        return f"task {self.task}, document {self.doc_id}"

    @property
    def asked(self) -> str:
        """A digest of the prompt and of how it is to be answered."""
        return digest([self.text, self.options])[:12]


def _is_true(value: bool | str) -> bool:
    """The harness's command line passes booleans as words."""
    return value if isinstance(value, bool) else str(value).lower() in ("true", "1", "yes")


def load_engine(path: str, conversation: str | None, device: str, dtype: torch.dtype) -> Engine:
    """The model of a checkpoint in LLaVA's own format or in transformers'; its config.json says which.

    Raises ValueError or OSError for a checkpoint of another kind, or one that does not load.
    """
    from .models_hf import HuggingFace, class_of

    name = class_of(path)
    if name is not None:
        return HuggingFace(path, name, device, dtype)
    from .models_llava import Llava

    return Llava(path, conversation, device, dtype)


def open_visual(visual, frames: int) -> Image.Image | list[Image.Image]:
    """An image, or a video's frames, of what a task shows: an image, the frames themselves, or the path of an
    image, a video or a folder of frames.

    Raises:
        ValueError: for what cannot be shown.
    """
    if isinstance(visual, list) and visual and all(isinstance(frame, Image.Image) for frame in visual):
        return [open_image(frame) for frame in visual]
    if not isinstance(visual, (Image.Image, str)):
        raise ValueError(f"it shows {type(visual).__name__}: the model libra takes images and video files")
    if isinstance(visual, str) and not is_picture(visual):
        return load_frames(visual, frames)
    return open_image(visual)


class LibraModel(lmms):
    """``--model libra``. Greedy or sampled generation in batches; no log-likelihoods, one round.

    config: a row, its YAML file, or with ``pretrained`` a file with a compression's keys only. pretrained: a
    folder or hub name instead of the registry's checkpoint, of LLaVA, VideoLLaMA-2 or any model that
    libra.attach supports. blind: grey images of the same size instead of the real ones. sample_log: a JSONL
    of finished samples; what stands there of the same row, checkpoint and code is not computed again. frames:
    of a video, where the model's own number is not wanted.
    """

    is_simple = True

    def __init__(
        self,
        config: str | Row | None = None,
        pretrained: str | None = None,
        device: str | None = None,
        batch_size: int | str = 8,
        dtype: str = "float32",
        blind: bool | str = False,
        sample_log: str | None = None,
        frames: int | str | None = None,
    ):
        """Raises ValueError for a bad row, an unknown dtype, a bad number, and a checkpoint that does not
        load."""
        super().__init__()
        if config is None:
            raise ValueError("config= is missing: name a row, such as config=mini/r50 or mini/vanilla")
        row = config if isinstance(config, Row) else Row.from_yaml(config, needs_model=False)
        if not row.model and not pretrained:
            raise ValueError(
                f"{row.path}: it names no model; add `model:` to it, or name a checkpoint with pretrained=…"
            )
        if dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"dtype must be float32, float16 or bfloat16, not {dtype!r}")
        for name, number in (("batch_size", batch_size), ("frames", frames or 1)):
            if not str(number).isdigit() or int(number) < 1:
                raise ValueError(f"{name} must be a positive whole number, not {number!r}")
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if device is None:
            device = rank_device()
        self.device, self.batch_size = torch.device(device), int(batch_size)
        spec = get_model(row.model, row.path) if row.model else None
        path = find_reachable(pretrained or spec.checkpoint)
        self.engine = load_engine(path, spec.conversation if spec else None, device, getattr(torch, dtype))
        if frames:
            self.engine.frames = int(frames)
        self.sample_log: SampleLog | None = None
        if sample_log:
            name = sample_log if self._world_size == 1 else f"{sample_log}.rank{self._rank}"
            made_by = [row_identity(row), checkpoint_identity(path), code_identity()]
            self.sample_log = SampleLog(
                name, digest([*made_by, _is_true(blind), dtype, self.engine.frames]), is_answer
            )
        self.on_samples: Callable[[int], None] = lambda count: None  # told about every finished batch
        self.records: dict[tuple[str, int], dict] = {}  # of the last generate_until
        self.set_row(row, _is_true(blind))

    def set_row(self, row: Row, blind: bool = False, trace: bool = False) -> None:
        """Go over to another row of the same model, without loading it again; ValueError for a layer it does
        not have.

        ``trace``: each record also holds the similarity and the compensation share of each compression layer.
        """
        self.engine.set_row(row, trace)
        self.blind, self.compression = blind, row.compression

    def clean(self) -> None:
        """Keep the model for the next task; the harness would delete it after each."""

    def loglikelihood(self, requests):
        raise NotImplementedError(
            "the model libra gives answers, no likelihoods: choose a task of output_type generate_until"
        )

    def generate_until_multi_round(self, requests):
        raise NotImplementedError(
            "the model libra answers one round: choose a task of output_type generate_until"
        )

    def generate_until(self, requests) -> list[str]:
        """The answers in the order of ``requests``.

        Batches are formed over all requests, finished or not, so that a resumed run computes the very same
        batches. Raises ValueError for an image or a video that cannot be read, and where compression is asked
        and not a single request shows anything.
        """
        answers = [""] * len(requests)
        groups: dict[str, list[_Request]] = {}
        self.records = {}
        for place, request in enumerate(requests):
            text, options, doc_to_visual, doc_id, task, split = request.args
            groups.setdefault(json.dumps(options, sort_keys=True, default=str), []).append(
                _Request(place, task, int(doc_id), text, doc_to_visual, split, options)
            )
        if self.compression.compresses and not any(
            self._visuals(request) for group in groups.values() for request in group
        ):
            tasks = ", ".join(sorted({request.task for group in groups.values() for request in group}))
            raise ValueError(
                f"task {tasks} gives no image, and compression needs visual tokens: run it with a vanilla row"
            )
        for group in groups.values():
            group.sort(
                key=lambda request: len(request.text)
            )  # stable, so equal lengths keep the harness's order
            for start in range(0, len(group), self.batch_size):
                batch = group[start : start + self.batch_size]
                self._finish(batch)
                for request in batch:
                    answers[request.place] = self.records[request.task, request.doc_id]["answer"]
                self.on_samples(len(batch))
        return answers

    def _finish(self, batch: list[_Request]) -> None:
        """Take a batch's records from the sample log, compute the ones it lacks, and log those.

        They are computed with the whole batch, for in another batch an answer may round otherwise.
        """
        logged = {}
        for request in batch if self.sample_log is not None else ():
            record = self.sample_log.get(request.task, request.doc_id)
            if record is not None and record["asked"] == request.asked:
                logged[record["task"], record["doc_id"]] = record
        self.records.update(logged)
        if len(logged) == len(batch):
            return
        started = time.perf_counter()
        records = self._records(batch, [self._sample(request) for request in batch])
        seconds = (time.perf_counter() - started) / len(batch)
        fresh = [
            {**record, "seconds": seconds}
            for record in records
            if (record["task"], record["doc_id"]) not in logged
        ]
        self.records.update({(record["task"], record["doc_id"]): record for record in fresh})
        if self.sample_log is not None:
            self.sample_log.append(fresh)

    def _visuals(self, request: _Request) -> list:
        """What a document shows: images, and paths of images and videos; ValueError for what cannot be
        read."""
        try:
            return request.doc_to_visual(self.task_dict[request.task][request.split][request.doc_id]) or []
        except SystemExit as leaving:  # how Video-MME says that a video is not there
            raise ValueError(f"{request.name}: {leaving}") from None
        except BROKEN as error:
            kind = type(error).__name__
            raise ValueError(
                f"{request.name}: its image is damaged ({kind}); download the data set again"
            ) from error

    def _sample(self, request: _Request) -> Sample:
        """What the model is asked; ValueError for what it cannot be shown."""
        shown = []
        for visual in self._visuals(request):
            try:
                one = open_visual(visual, self.engine.frames)
            except ValueError as error:
                raise ValueError(f"{request.name}: {error}") from error
            shown.append(blinded(one) if self.blind else one)
        return Sample(request.name, request.text, shown)

    def _records(self, batch: list[_Request], samples: list[Sample]) -> list[dict]:
        """Answer a batch; rows that show nothing are generated apart from those that do."""
        records: list[dict] = [{}] * len(batch)
        for seeing in (True, False):
            chosen = [i for i, sample in enumerate(samples) if bool(sample.shown) is seeing]
            if not chosen:
                continue
            texts, facts = self.engine.generate([samples[i] for i in chosen], batch[0].options)
            for i, text, fact in zip(chosen, texts, facts, strict=True):
                own = {"task": batch[i].task, "doc_id": batch[i].doc_id, "asked": batch[i].asked}
                records[i] = {**own, "answer": text, **fact}
        return records


def is_answer(record: dict) -> bool:
    """Whether a logged record has all that :meth:`LibraModel.generate_until` and a table need of an
    answer."""
    numbers = [record.get("seconds"), record.get("cache_bytes")]
    tokens, trace = record.get("tokens"), record.get("trace")
    if not isinstance(tokens, list) or not isinstance(trace, list):
        return False
    for stage in trace:
        if not isinstance(stage, list) or len(stage) != 2:
            return False
        numbers += [number for number in stage if number is not None]
    return all(isinstance(record.get(key), str) for key in ("asked", "answer")) and all(
        map(is_number, numbers + tokens)
    )


def is_number(value: object) -> bool:
    """Whether a value of JSON is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
