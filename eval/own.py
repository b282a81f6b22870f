"""What a user brings to a table without editing a file of this project: models, rows and tasks."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

from libra.checkpoints import find_reachable, find_tower
from libra.rows import ModelSpec, add_model, patches_across, spec_of
from libra.utils.files import write_json

from .cells import read_json
from .suites import SUITES, SuiteRows, Table, add_tasks

FILE = "own.json"  # in a results folder, so that a report by itself knows what the run knew


@dataclass(frozen=True)
class Own:
    """A user's models, folder of rows and folder of lmms-eval tasks; ``table``: the one that they fill."""

    models: tuple[ModelSpec, ...] = ()
    configs: Path | None = None
    tasks: Path | None = None
    table: str = ""

    def apply(self) -> None:
        """Make the models and tasks known in this process. Raises ValueError for names that are taken."""
        for spec in self.models:
            add_model(spec)
            SUITES.setdefault(spec.name, spec.name)
        if self.tasks is not None:
            add_tasks(self.tasks)

    @property
    def suites(self) -> tuple[str, ...]:
        """Of :data:`eval.suites.OWN`."""
        return (*(spec.name for spec in self.models), "mini")

    def rows(self, table: Table, suite: str) -> SuiteRows:
        """Of a table; with those of one's own folder where it is the table that they fill."""
        return SuiteRows(table, suite, self.configs if self.table == table.name else None)

    def save(self, output: Path) -> None:
        """Into a results folder."""
        folders = {
            name: str(path.resolve())
            for name in ("configs", "tasks")
            if (path := getattr(self, name)) is not None
        }
        data = {"table": self.table, "models": [asdict(spec) for spec in self.models], **folders}
        write_json(output / FILE, data)

    @classmethod
    def load(cls, output: Path) -> "Own":
        """Of a results folder; nothing of one's own where none was saved. Raises ValueError where what was
        saved is damaged: without it the table would lack rows and models."""
        path = output / FILE
        if not path.exists():
            return cls()
        try:
            data = read_json(path) or {}
            folders = {name: Path(data[name]) for name in ("configs", "tasks") if name in data}
            models = tuple(
                ModelSpec(**{**spec, "visual_tokens": tuple(spec["visual_tokens"])})
                for spec in data["models"]
            )
            return cls(models, table=data["table"], **folders)
        except (KeyError, TypeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{path} is damaged ({reason}); run the same eval.run command again") from None


def model_of(text: str) -> ModelSpec:
    """The model of ``NAME=PATH`` or ``NAME=PATH:TEMPLATE``: a folder or hub name, in LLaVA's own format or
    in transformers', and the conversation template of the former.

    Raises:
        ValueError: for a text of another form, and a checkpoint whose config.json cannot be read.
    """
    name, _, path = text.partition("=")
    if not re.fullmatch(r"[\w-]+", name) or not path:
        raise ValueError(
            f"--model {text}: write NAME=PATH or NAME=PATH:TEMPLATE, such as mine=out/llava:vicuna_v1"
        )
    from llava.conversation import conv_templates

    path, _, template = path.rpartition(":") if path.rpartition(":")[2] in conv_templates else (path, "", "")
    sizes, visual = _sizes(find_reachable(path), name)
    given = asdict(sizes) | {"checkpoint": path, "visual_tokens": visual, "conversation": template or None}
    return ModelSpec(**given)


def _sizes(path: str, name: str) -> tuple[ModelSpec, tuple[int, ...]]:
    """A checkpoint's sizes, and the visual tokens of a picture where all have as many."""
    from transformers import AutoConfig

    from libra.engine.transformers_api import PreTrainedConfig

    try:
        values = PreTrainedConfig.get_config_dict(path)[0]
        if "vision_config" in values:
            config = AutoConfig.from_pretrained(path)
            one = values.get("model_type") == "llava"
            return spec_of(config.get_text_config(), name), _squares(config.vision_config) if one else ()
        text = {"num_key_value_heads": values["num_attention_heads"], **values}
        return spec_of(SimpleNamespace(**text), name), _tower_squares(values, path)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--model {name}: the sizes of {path} cannot be read ({reason})") from error


def _tower_squares(values: dict, path: str) -> tuple[int, ...]:
    """Of a checkpoint in LLaVA's own format: known where its tower lies next to it and pictures are not cut
    into tiles."""
    from libra.engine.transformers_api import PreTrainedConfig

    tower = find_tower(values.get("mm_vision_tower", ""), Path(path))
    if tower is None or values.get("image_aspect_ratio") == "anyres" or "num_frames" in values:
        return ()
    config = PreTrainedConfig.get_config_dict(str(tower))[0]
    return _squares(SimpleNamespace(**config.get("vision_config", config)))


def _squares(vision) -> tuple[int, ...]:
    return (patches_across(vision) ** 2,)
