"""Table rows and models by name: what a row's YAML file says, the rows that come with the package, and the
sizes of the models (models.yaml next to this module).

In the repository the rows are in `configs/` and the embedded model is in `mini/checkpoint/`; setup.py copies
them into the package.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from .budget import solve
from .config import BUDGETS, Compression, at, check_keys, choice
from .methods import METHODS
from .places import LAYERS
from .utils import plain_yaml, plugins
from .utils.provenance import REPOSITORY
from .utils.sentences import ConfigError, did_you_mean, show, spelled

_FILE = Path(__file__).with_name("models.yaml")
_PACKAGE = Path(__file__).resolve().parent


def _folder(name: str) -> Path:
    """A folder of the installed package, else the repository's."""
    return _PACKAGE / name if (_PACKAGE / name).is_dir() else REPOSITORY / name


CONFIGS, EMBEDDED = _folder("configs"), _folder("mini/checkpoint")
_EXAMPLE = "llava7b_r50"  # of a shipped row's name


@cache
def shipped_rows() -> dict[str, Path]:
    """Name → file of every shipped row. The name is the path below configs/, without .yaml."""
    return {
        path.relative_to(CONFIGS).with_suffix("").as_posix(): path for path in sorted(CONFIGS.rglob("*.yaml"))
    }


def shipped_row(name: str) -> Path:
    """The file of a shipped row. Raises ConfigError for another name."""
    found = spelled(name, shipped_rows())
    if found is None:
        examples = [name for name in shipped_rows() if "/" not in name][:3]
        hint = (
            did_you_mean(str(name), shipped_rows())
            or f" the names are {', '.join(examples)} …, the files of configs/"
        )
        raise ConfigError(f"{show(name)} is not the name of a row;{hint}")
    return shipped_rows()[found]


def find_row(given: str | Path) -> tuple[Path, str]:
    """The file that a user means, and what to call it: a path, else the name of a shipped row, which may also
    be written as `configs/NAME.yaml`. Raises ConfigError where there is neither.
    """
    path = Path(given)
    try:
        if path.exists():
            return path, str(given)
    except (OSError, ValueError):  # a name too long, or with a zero byte: whoever opens it says so
        return path, str(given)
    name = path.as_posix().removeprefix("configs/").removesuffix(".yaml")
    found = spelled(name, shipped_rows())
    if found is None:
        neighbours = [other.name for other in path.parent.glob("*.yaml")]
        hint = did_you_mean(path.name, neighbours) or did_you_mean(name, shipped_rows()) or " check the path"
        raise ConfigError(f"{path}: there is no such file, and no row of that name;{hint}")
    return shipped_rows()[found], found


@dataclass(frozen=True)
class Row:
    """One row of a table, as its YAML file describes it.

    model: a name in models.yaml; tasks: what it is evaluated on; paper: the paper's figures for it, for
        comparison only;
    name: the file's stem unless given; path: the file; title: in a table, the name unless given; attention:
    how the model attends, one of `ATTENTIONS`. The score row is computed next to any of them;
    plugins: modules that register its select or merge, see :mod:`libra.utils.plugins`.
    """

    model: str
    compression: Compression
    tasks: list[str] = field(default_factory=list)
    paper: dict[str, float] = field(default_factory=dict)
    name: str = ""
    path: str = ""
    title: str = ""
    attention: str = "sdpa"
    plugins: tuple[str, ...] = ()

    @classmethod
    def from_yaml(cls, path: str | Path, needs_model: bool = True) -> "Row":
        """Reads and checks a row's file; without layers the compression gets the natural places of the row's
        model.

        path: a file, or the name of a shipped row; needs_model: False also takes a compression's keys only,
        as a row whose model is "". Raises ConfigError naming the key and the file.
        """
        file, source = find_row(path)
        mapping = plain_yaml.load(file)
        if not needs_model and not mapping.keys() & {f.name for f in fields(cls)}:
            name = Path(source).stem
            return cls("", _block(mapping, source), name=name, path=source, title=name)
        row = _row(mapping, source)
        c = row.compression
        if c.tokens is not None or c.flops is not None:
            c = _solved(c, get_model(row.model, row.path), row.path)
        if c.layers is None and c.place == LAYERS:
            c = c.at_depth(get_model(row.model, row.path).layers, row.path)
        return replace(row, compression=c)


ROW_KEYS = ("model", "compression", "tasks", "paper", "name", "title", "attention", "plugins")
_NO_LAYERS = (
    "layers: there are none; write for example layers: [7, 15, 23], remove the key for the method's natural "
    "places, or write method: vanilla to compress nothing"
)


def _solved(c: Compression, spec: "ModelSpec", source: str) -> Compression:
    """With a ratio for a budget of the whole model, which a model of one sequence has."""
    try:
        if len(spec.visual_tokens) != 1:
            raise ConfigError(
                f"{c.amount.replace(' ', ': ', 1)} needs one number of visual tokens, which {spec.name} does "
                "not have; write ratio or keep"
            )
        return solve(c, spec, spec.visual_tokens[0])
    except ConfigError as error:
        raise at(source, error) from None


def read_compression(path: str | Path) -> Compression:
    """The compression of a YAML file or a shipped row, see :meth:`Compression.from_yaml`."""
    file, source = find_row(path)
    mapping = plain_yaml.load(file)
    if mapping.keys() & {f.name for f in fields(Row)}:
        return _row(mapping, source).compression
    return _block(mapping, source)


def compression_from(
    given: Compression | Mapping[str, Any] | str | Path | None = None, files: bool = True, **keys
) -> Compression:
    """What a user means by a compression, wherever one can be named.

    given: a compression; a dictionary of its keys; a method's name, such as ``"divprune"``; a shipped row's
        name, such as ``"mini/r50"``; or the path of a YAML file. None: Libra-Merging.
    files: False takes no path, for what a stranger names.
    keys: keys of the compression (``ratio=0.5``, ``keep=64``, ``layers=(2, 5)``) that take the place of those
        of ``given``; a budget takes the place of its budget. Keys that are None are left out.

    Raises:
        ConfigError: for a name that is none of these, and whatever :class:`Compression` refuses.
    """
    keys = {key: value for key, value in keys.items() if value is not None}
    if given is None:
        given = {} if keys.keys() & {"method", "select", "merge", "steps"} else {"method": "libra"}
    if not isinstance(given, (Compression, str, Path)):
        return Compression.from_dict({**given, **keys} if isinstance(given, Mapping) else given)
    if not isinstance(given, Compression):
        name = str(given)
        if (method := spelled(name, METHODS)) is not None and not (files and Path(name).is_file()):
            return Compression.from_dict({"method": method, **keys})
        if not files or not {"/", "\\", "."} & set(name):
            name = _no_file(name)
        given = read_compression(name)
    if not keys:
        return given
    if given.steps is not None:
        raise ConfigError(f"{next(iter(keys))}: this compression has steps; write it in a step")
    own = given.to_dict()
    if keys.keys() & set(BUDGETS):
        own = {key: value for key, value in own.items() if key not in BUDGETS}
    return Compression.from_dict({**own, **keys})


def _no_file(name: str) -> str:
    """A shipped row's name. Raises ConfigError for anything else, whatever files there are."""
    if spelled(name, shipped_rows()) is None:
        hint = did_you_mean(name, (*METHODS, *shipped_rows())) or f" the methods are {', '.join(METHODS)}"
        raise ConfigError(
            f"compression: {show(name)} is neither a method nor a row such as {_EXAMPLE};{hint}"
        )
    return str(shipped_row(name))


def _row(mapping: dict[Any, Any], source: str) -> Row:
    """A row from a file's keys; its compression may still be without layers."""
    try:
        check_keys("a row", mapping, ROW_KEYS)
        for key, example in (
            ("model", "model: llava-1.5-7b"),
            ("compression", "compression: {method: vanilla}"),
        ):
            if key not in mapping:
                raise ConfigError(f"{key}: is missing; a row needs it, for example `{example}`")
        for key in ("model", "name", "title"):
            if key in mapping and not _is_name(mapping[key]):
                raise ConfigError(f"{key}: {show(mapping[key])} is not a name; write a text of one line")
        attention = choice("attention", mapping.get("attention", Row.attention))
        tasks, paper = _tasks(mapping.get("tasks", [])), _paper(mapping.get("paper", {}))
        modules = plugins.of_row(_plugins(mapping.get("plugins", [])), Path(source).parent)
    except ConfigError as error:
        raise at(source, error) from None
    name = mapping.get("name", Path(source).stem)
    compression = _block(mapping["compression"], source)
    title = mapping.get("title", name)
    return Row(mapping["model"], compression, tasks, paper, name, source, title, attention, modules)


def _tasks(tasks: Any) -> list[str]:
    if not isinstance(tasks, list) or not all(map(_is_name, tasks)):
        raise ConfigError(f"tasks: {show(tasks)} is not a list of task names; write for example [gqa, mme]")
    if len(set(tasks)) < len(tasks):
        raise ConfigError(f"tasks: {show(tasks)} names a task twice; name each once")
    return tasks


def _plugins(names: Any) -> list[str]:
    if not isinstance(names, list) or not all(map(_is_name, names)):
        raise ConfigError(
            f"plugins: {show(names)} is not a list of modules; write for example [my_package.mine] or "
            "[mine.py]"
        )
    return names


def _paper(paper: Any) -> dict[str, float]:
    if not isinstance(paper, dict):
        raise ConfigError(
            f"paper: {show(paper)} is not a mapping; write for example {{table: 1, flops: 1.78}}"
        )
    for key, value in paper.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not _is_name(key) or not number or not abs(value) < 1e15:
            raise ConfigError(f"paper: {show(key)}: {show(value)} is not a figure; write a name and a number")
    return paper


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and value.isprintable()


def _block(mapping: Any, source: str) -> Compression:
    """A file's compression keys; unlike a dictionary's, its list of layers is not allowed to be empty."""
    compression = Compression.from_dict(mapping, source)
    if not compression.compresses and compression.acts:
        raise at(source, ConfigError(_NO_LAYERS))
    return compression


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


def patches_across(vision: Any) -> int:
    """Patches along an edge of what a vision tower sees, by its configuration; sizes may be pairs."""
    size, patch = (x if isinstance(x, int) else x[0] for x in (vision.image_size, vision.patch_size))
    return size // patch


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


ADDED: dict[str, ModelSpec] = {}  # of this process, by name


def load_models() -> dict[str, ModelSpec]:
    """Every model of models.yaml by name, in the file's order, then those of :func:`add_model`."""
    return {**_models(), **ADDED}


def add_model(spec: ModelSpec) -> None:
    """Make a model known by its name in this process. Raises ConfigError for a name of models.yaml."""
    if spelled(spec.name, _models()) is not None:
        raise ConfigError(f"model: {show(spec.name)} is a model of {_FILE.name}; choose another name")
    ADDED[spec.name] = spec


def get_model(name: str, source: str = "") -> ModelSpec:
    """The model of that name. ConfigError with the list of names for any other; `source` (a file) opens the
    sentence."""
    models = load_models()
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
            problem = "is missing" if key in needed else "is not a key of a model"
            raise ConfigError(
                f"{_FILE.name}: {name}: {key} {problem}; the keys are {', '.join(sorted(known))}"
            )
        models[name] = ModelSpec(name=name, **(keys | {"visual_tokens": tuple(keys["visual_tokens"])}))
    return models
