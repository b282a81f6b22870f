"""The served model, loaded by transformers' model manager; LLaVA's own format is converted first."""

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText
from transformers.cli.serving.model_manager import ModelManager

import libra
from llava.convert.converter import convert, detect
from llava.model import huggingface

from ..checkpoints import find_reachable
from ..config import NOTHING
from ..rows import EMBEDDED
from ..utils.devices import find_device

LARGE = 10**9  # bytes of a checkpoint that is better converted once


@dataclass(frozen=True)
class Model:
    """A loaded model.

    Attributes:
        name: what requests call it.
        manager: transformers' manager, which holds it.
        context: tokens of a prompt and its answer together.
    """

    name: str
    manager: "PinnedManager"
    model: torch.nn.Module
    processor: Any
    context: int


class PinnedManager(ModelManager):
    """transformers' manager of one model, which is looked at before it is loaded and never goes.

    Args:
        name: what ``/v1/models`` calls it.
    """

    def __init__(self, path: str, name: str, device: str, dtype: str):
        self.name, self.since = name, int(time.time())
        super().__init__(device=device, dtype=dtype, force_model=path)

    def _load_processor(self, model_id_and_revision, gguf_file=None):
        processor = super()._load_processor(model_id_and_revision, gguf_file)
        if not getattr(processor, "chat_template", None) or not hasattr(processor, "image_processor"):
            raise ValueError(
                f"the model {self.name} has no chat template for pictures; add chat_template.jinja to it"
            )
        huggingface.scale_by_pillow(processor, model_id_and_revision.split("@")[0])
        huggingface.pad_left(processor.tokenizer)
        return processor

    def _load_model(self, model_id_and_revision, **_):
        model = huggingface.load(
            AutoModelForImageTextToText,
            model_id_and_revision.split("@")[0],
            dtype=self.dtype,
            device_map={"": self.device},
        ).eval()
        libra.attach(model, NOTHING).detach()  # which refuses models that cannot be compressed
        huggingface.pad_by_end(model)
        return model

    def get_gen_models(self, cache_dir=None) -> list[dict]:
        """The one model, in the protocol's form; what else lies in the hub's cache is nobody's business."""
        entry = {"id": self.name, "object": "model", "created": self.since, "owned_by": "libra"}
        return [{**entry, "version": libra.__version__}]


def load(given: str, name: str | None, device: str, dtype: str) -> Model:
    """The model of a folder, a hub name or a name in models.yaml, such as ``mini``.

    Args:
        given: in transformers' or LLaVA's own format. The latter is converted into a temporary folder.
        name: what requests call it; by default its folder's name, or its name in the hub.
        device: such as cpu or cuda:0; auto takes the GPU where there is one.
        dtype: such as bfloat16; auto is the checkpoint's own, float32 on a CPU.

    Raises:
        ValueError: in one sentence, for what cannot be loaded or compressed.
    """
    path = find_reachable(given)
    device = str(find_device(device))
    if dtype == "auto" and device == "cpu":
        dtype = "float32"  # half precision is slower there
    folder = Path(path)
    name = name or _name(folder, given)
    with tempfile.TemporaryDirectory(prefix="libra-serve-") as temporary:
        if folder.is_dir():
            if detect_original(folder):
                path = str(Path(temporary, "converted"))
                _convert(folder, path)
            elif set(path) & set("@:"):
                raise ValueError(
                    f"{path} has @ or : in it, which transformers' server reads otherwise; rename it"
                )
        try:
            manager = PinnedManager(path, name, device, dtype)
        except OSError as error:
            raise ValueError(f"the model {given} cannot be loaded: {' '.join(str(error).split())}") from error
    [held] = manager.loaded_models.values()
    context = held.model.config.get_text_config().max_position_embeddings
    return Model(name, manager, held.model, held.processor, context)


def _name(folder: Path, given: str) -> str:
    if folder.is_dir():
        return "mini" if folder.resolve() == EMBEDDED.resolve() else folder.resolve().name
    return given


def detect_original(folder: Path) -> bool:
    """Whether a folder is in LLaVA's own format. Raises ValueError where config.json cannot be read."""
    try:
        return detect(folder) == "original"
    except ValueError:
        if not (folder / "config.json").is_file():
            raise
        return False  # another family of transformers


def _convert(folder: Path, destination: str) -> None:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if size > LARGE:
        print(
            f"note: {folder} is in LLaVA's own format and is converted at every start; convert it once:"
            f" python -m llava.convert {folder} FOLDER, and serve FOLDER",
            file=sys.stderr,
        )
    convert(str(folder), destination, "hf")
