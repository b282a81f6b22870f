"""The models a row can name: their sizes, checkpoints and prompt templates, from models.yaml beside this
module."""

from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path

import yaml

from .utils.names import spelled
from .utils.sentences import ConfigError, did_you_mean, show

_FILE = Path(__file__).with_name("models.yaml")


@dataclass(frozen=True)
class ModelSpec:
    """One model.

    layers, hidden_size (d), intermediate_size (m), kv_size (d_kv: key and value heads × head size): the
    decoder's sizes;
    visual_tokens: tokens of each sequence a sample makes, empty where they depend on the image;
    checkpoint: a hub name, or a folder of the repository; conversation: template name, None for the
        tokenizer's own;
    text_tokens: length of a usual prompt, where known; note: where a number comes from that is not the
        model's own.
    """

    name: str
    layers: int
    hidden_size: int
    intermediate_size: int
    kv_size: int
    visual_tokens: tuple[int, ...]
    checkpoint: str
    conversation: str | None = None
    text_tokens: int | None = None
    note: str = ""


def spec_of(config, name: str) -> ModelSpec:
    """The sizes of a Hugging Face text configuration; visual tokens and checkpoint are left empty."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelSpec(
        name=name,
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        kv_size=head * config.num_key_value_heads,
        visual_tokens=(),
        checkpoint="",
    )


def load_models() -> dict[str, ModelSpec]:
    """Every model of models.yaml by name, in the file's order."""
    return dict(_models())


def get_model(name: str, source: str = "") -> ModelSpec:
    """The model of that name. ConfigError with the list of names for any other; `source` (a file) opens the
    sentence."""
    models = _models()
    found = spelled(name, models)
    if found is None:
        hint = did_you_mean(name, models)
        where = f"{source}: " if source else ""
        raise ConfigError(f"{where}model: {show(name)} is unknown;{hint} use one of {', '.join(models)}")
    return models[found]


@cache
def _models() -> dict[str, ModelSpec]:
    table = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    known = {f.name for f in fields(ModelSpec)} - {"name"}
    needed = {f.name for f in fields(ModelSpec) if f.default is MISSING} - {"name"}
    models = {}
    for name, keys in table.items():
        for key in (keys.keys() - known) | (needed - keys.keys()):
            problem = "is missing" if key in needed else "is no key of a model"
            raise ConfigError(
                f"{_FILE.name}: {name}: {key} {problem}; the keys are {', '.join(sorted(known))}"
            )
        models[name] = ModelSpec(name=name, **(keys | {"visual_tokens": tuple(keys["visual_tokens"])}))
    return models
