"""Which way a checkpoint is to be converted, and the conversion as a whole."""

from collections.abc import Callable
from pathlib import Path

from ..mm_utils import get_model_name_from_path
from ..model.settings import is_original
from ..model.weights import local_folder, read_json
from .folder import staged
from .to_hf import to_hf
from .to_original import to_original
from .weights import forget

FORMATS: dict[str, Callable] = {"hf": to_hf, "original": to_original}


def detect(source: Path) -> str:
    """The format of a checkpoint, "hf" or "original", by its config.json.

    Raises:
        ValueError: if it is neither.
    """
    config = read_json(source / "config.json")
    if isinstance(config.get("text_config"), dict):
        return "hf"
    if is_original(config):
        return "original"
    raise ValueError(
        f"{source} is of type {config.get('model_type')!r}: neither a LLaVA checkpoint in the original's "
        "format nor a llava-hf folder"
    )


def convert(
    source: str,
    destination: str,
    to: str | None = None,
    max_shard_size: int = 5 * 10**9,
    conversation: str | None = None,
) -> list[str]:
    """Convert a checkpoint; the destination appears when it is whole, or not at all.

    Args:
        source: folder or hub name.
        destination: a folder that does not exist yet.
        to: "hf" or "original"; the other than the source's by default.
        max_shard_size: bytes of a weight file; a single larger tensor gets a file of its own.
        conversation: name of the prompt template; by default the checkpoint's own or by its name.

    Returns:
        What was written, in sentences.

    Raises:
        ValueError: if the source is incomplete, damaged or cannot be expressed in the other format, or the
            destination exists or cannot be written.
    """
    folder, target = local_folder(source), Path(destination)
    found = detect(folder)
    to = to or {"hf": "original", "original": "hf"}[found]
    if to == found:
        raise ValueError(f"{source} already is in the format {to!r}")
    try:
        with staged(target) as stage:
            return FORMATS[to](folder, stage, max_shard_size, conversation, get_model_name_from_path(source))
    except OSError as error:
        raise ValueError(
            f"the conversion to {destination} failed ({error}); nothing was left behind"
        ) from error
    finally:
        forget()
