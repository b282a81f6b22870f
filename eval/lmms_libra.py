"""The lmms-eval model ``libra``: a LLaVA checkpoint with the compression that a table row's YAML names.

    python -m eval --model libra --model_args config=configs/mini/r50.yaml --include_path eval/tasks --tasks mini_reading
"""

import json
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from lmms_eval.api.model import lmms
from PIL import Image

from libra.config import Row
from libra.registry import get_model
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model

from .checkpoints import find_checkpoint
from .samples import SampleLog

GREY = (127, 127, 127)
MAX_NEW_TOKENS = 1024  # what the harness's own LLaVA model takes where a task says nothing


class _Request(NamedTuple):
    place: int  # in the harness's list
    task: str
    doc_id: int
    text: str
    doc_to_visual: Callable
    split: str
    options: dict


def _is_true(value: bool | str) -> bool:
    """The harness's command line passes booleans as words."""
    return value if isinstance(value, bool) else str(value).lower() in ("true", "1", "yes")


class LibraModel(lmms):
    """``--model libra``. Greedy or sampled generation in batches; no log-likelihoods, one round.

    config: a row's YAML. checkpoint: overrides the registry's. blind: grey images of the same size instead of the real
    ones. sample_log: a JSONL of finished samples; what stands there is not computed again.
    """

    is_simple = True

    def __init__(
        self,
        config: str,
        checkpoint: str | None = None,
        device: str | None = None,
        batch_size: int | str = 8,
        dtype: str = "float32",
        blind: bool | str = False,
        sample_log: str | None = None,
    ):
        """Raises ValueError for a bad row, an unknown dtype or batch size, and a checkpoint that does not load."""
        super().__init__()
        row = Row.from_yaml(config)
        if dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"dtype must be float32, float16 or bfloat16, not {dtype!r}")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a positive whole number, not {batch_size!r}")
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if device is None:
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        self.device, self.dtype, self.batch_size = torch.device(device), getattr(torch, dtype), int(batch_size)
        spec = get_model(row.model, row.path)
        if spec.conversation not in conv_templates:
            raise ValueError(f"model {row.model} has no conversation template of llava.conversation: name one in the registry")
        self.conversation = spec.conversation
        path = find_checkpoint(checkpoint or spec.checkpoint)
        self.tokenizer, self.model, self.image_processor, _ = load_pretrained_model(
            path, None, get_model_name_from_path(path), device=device, torch_dtype=self.dtype,
        )
        self.model.eval()
        self.sample_log: SampleLog | None = None
        if sample_log:
            name = sample_log if self._world_size == 1 else f"{sample_log}.rank{self._rank}"
            self.sample_log = SampleLog(name)
        self.on_samples: Callable[[int], None] = lambda count: None  # told about every finished batch
        self.records: dict[tuple[str, int], dict] = {}  # of the last generate_until
        self.set_row(row, _is_true(blind))

    def set_row(self, row: Row, blind: bool = False) -> None:
        """Go over to another row of the same model, without loading it again; ValueError for a layer it does not have."""
        self.model.set_compression(row.compression)
        self.blind, self.compression = blind, row.compression

    def clean(self) -> None:
        """Keep the model for the next task; the harness would delete it after each."""

    def loglikelihood(self, requests):
        raise NotImplementedError("the model libra gives answers, no likelihoods: choose a task of output_type generate_until")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("the model libra answers one round: choose a task of output_type generate_until")

    def generate_until(self, requests) -> list[str]:
        """The answers in the order of ``requests``.

        Batches are formed over all requests, finished or not, so that a resumed run computes the very same batches.
        Raises ValueError where compression is asked and not a single request has an image.
        """
        answers = [""] * len(requests)
        groups: dict[str, list[_Request]] = {}
        self.records = {}
        for place, request in enumerate(requests):
            text, options, doc_to_visual, doc_id, task, split = request.args
            groups.setdefault(json.dumps(options, sort_keys=True, default=str), []).append(
                _Request(place, task, int(doc_id), text, doc_to_visual, split, options)
            )
        if self.compression.layers and not any(self._images(request) for group in groups.values() for request in group):
            tasks = ", ".join(sorted({request.task for group in groups.values() for request in group}))
            raise ValueError(f"task {tasks} gives no image, and compression needs visual tokens: run it with a vanilla row")
        for group in groups.values():
            group.sort(key=lambda request: len(request.text))  # stable, so equal lengths keep the harness's order
            for start in range(0, len(group), self.batch_size):
                batch = group[start : start + self.batch_size]
                self._finish(batch)
                for request in batch:
                    answers[request.place] = self.records[request.task, request.doc_id]["answer"]
                self.on_samples(len(batch))
        return answers

    def _finish(self, batch: list[_Request]) -> None:
        """Take a batch's records from the sample log, compute the ones it lacks, and log those."""
        missing = []
        for request in batch:
            record = self.sample_log.get(request.task, request.doc_id) if self.sample_log is not None else None
            if record is None:
                missing.append(request)
            else:
                self.records[request.task, request.doc_id] = record
        if not missing:
            return
        started = time.perf_counter()
        fresh = self._records(missing, [self._images(request) for request in missing])
        seconds = (time.perf_counter() - started) / len(missing)
        for record in fresh:
            record["seconds"] = seconds
            self.records[record["task"], record["doc_id"]] = record
        if self.sample_log is not None:
            self.sample_log.append(fresh)

    def _images(self, request: _Request) -> list[Image.Image]:
        """The images of a document; ValueError for what this model cannot read."""
        visuals = request.doc_to_visual(self.task_dict[request.task][request.split][request.doc_id]) or []
        for visual in visuals:
            if not isinstance(visual, Image.Image):
                raise ValueError(f"task {request.task} gives {type(visual).__name__}: the model libra reads images only")
        return [visual.convert("RGB") for visual in visuals]

    def _records(self, batch: list[_Request], images: list[list[Image.Image]]) -> list[dict]:
        """Answer a batch; rows without an image are generated apart from those with."""
        records: list[dict] = [{}] * len(batch)
        for chosen in ([i for i, own in enumerate(images) if own], [i for i, own in enumerate(images) if not own]):
            if not chosen:
                continue
            texts, tokens = self._generate([batch[i] for i in chosen], [images[i] for i in chosen])
            for i, text, counts in zip(chosen, texts, tokens, strict=True):
                records[i] = {"task": batch[i].task, "doc_id": batch[i].doc_id, "answer": text, "tokens": counts}
        return records

    def _prompt(self, text: str, images: int) -> torch.Tensor:
        if DEFAULT_IMAGE_TOKEN not in text and images:
            text = " ".join([DEFAULT_IMAGE_TOKEN] * images) + "\n" + text
        conversation = conv_templates[self.conversation].copy()
        conversation.append_message(conversation.roles[0], text)
        conversation.append_message(conversation.roles[1], None)
        return tokenizer_image_token(conversation.get_prompt(), self.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")

    @torch.inference_mode()
    def _generate(self, batch: list[_Request], images: list[list[Image.Image]]) -> tuple[list[str], list[list[int]]]:
        """Texts and visual tokens per layer of rows that share their generation options."""
        prompts = [self._prompt(request.text, len(own)) for request, own in zip(batch, images, strict=True)]
        length = max(len(prompt) for prompt in prompts)
        padding = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        ids = torch.full((len(batch), length), padding)
        mask = torch.zeros(len(batch), length, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt) :], mask[row, length - len(prompt) :] = prompt, True
        flat = [Image.new("RGB", image.size, GREY) if self.blind else image for own in images for image in own]
        pixels = None
        if flat:
            pixels = process_images(flat, self.image_processor, self.model.config)
            place = {"device": self.device, "dtype": self.dtype}
            pixels = [one.to(**place) for one in pixels] if isinstance(pixels, list) else pixels.to(**place)
        options = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, **batch[0].options}
        until = options.pop("until", None) or []
        if not options["do_sample"]:
            for name in ("temperature", "top_p", "top_k"):
                options.pop(name, None)
        self.model.set_compression(self.compression if flat else None)  # it refuses a batch that has nothing to compress
        output = self.model.generate(
            ids.to(self.device), images=pixels, image_sizes=[image.size for image in flat] or None,
            attention_mask=mask.to(self.device), pad_token_id=padding, **options,
        )
        texts = [text.strip() for text in self.tokenizer.batch_decode(output, skip_special_tokens=True)]
        for stop in [until] if isinstance(until, str) else until:
            texts = [text.split(stop)[0].strip() if stop else text for text in texts]
        return texts, self._tokens_per_layer(len(batch)) if flat else [[]] * len(batch)

    def _tokens_per_layer(self, rows: int) -> list[list[int]]:
        """Visual tokens that each layer saw, one list a row; empty where nothing was compressed."""
        stats = self.model.compression_stats
        if stats is None:
            return [[]] * rows
        return [[int(layer[row]) for layer in stats["visual_tokens"]] for row in range(rows)]
