"""Where a model's weights are: the embedded model's folder, any other folder, or the model hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .rows import EMBEDDED, load_models
from .utils.provenance import REPOSITORY
from .utils.sentences import ConfigError, did_you_mean, first_line, show, spelled


def find_checkpoint(given: str | Path) -> str:
    """The folder or the hub name that a user means by a folder, a hub name or a model's name in models.yaml,
    such as `mini`.

    A folder that is there comes first; relative ones start at the working directory, then at the repository.
    Raises ConfigError for a name that nearly is a model's.
    """
    name, models = str(given), load_models()
    model = spelled(name, models)
    if model is not None and not (Path(name) / "config.json").is_file():
        name = models[model].checkpoint
    if Path(name).is_dir():
        return name
    folder = EMBEDDED if name == models["mini"].checkpoint else REPOSITORY / name
    if folder.is_dir():
        return str(folder)
    hint = "" if "/" in name else did_you_mean(name, models)
    if hint:
        raise ConfigError(f"{show(name)} is neither a folder nor a model's name;{hint}")
    return name


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Where the hub is asked for a model: one sentence, a ValueError, for whatever goes wrong."""
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"there is no folder {name}") from error
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} is not a folder here, and the hub does not give it: {first_line(error)}"
        ) from error


def hub_file(name: str, file: str, kind: str = "model") -> Path:
    """A small file of a repository on the hub, from the local cache where the hub does not answer; its folder
    is named after the commit.

    The hub is asked once: without a network, what downloads a single file asks five times for half a minute.
    Raises the hub client's errors where the file cannot be had.
    """
    from huggingface_hub import snapshot_download

    folder = snapshot_download(name, repo_type=kind, allow_patterns=[file], etag_timeout=10)
    path = Path(folder, file)
    if not path.is_file():
        raise FileNotFoundError(f"{name} has no {file} there")
    return path


def find_reachable(given: str | Path) -> str:
    """What :func:`find_checkpoint` finds, after the hub was asked once where that is no folder.

    ``from_pretrained`` asks five times for each file of a checkpoint: without a network a wrong name would
    take minutes to be called wrong.

    Raises:
        ValueError: if it is no folder, and neither the hub nor the local cache has a config.json of it.
    """
    name = find_checkpoint(given)
    if Path(name).is_dir():
        return name
    with hub_errors(name):
        hub_file(name, "config.json")
    return name


def find_tower(name: str, folder: Path) -> Path | None:
    """The folder of the vision tower that a LLaVA checkpoint in ``folder`` names: in it or next to it; None
    for other names."""
    return next(
        (place / name for place in (folder, folder.parent) if (place / name / "config.json").is_file()), None
    )
