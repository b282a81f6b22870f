"""Whether a model's weights can be had, and what identifies them."""

import hashlib
import os
from pathlib import Path

from libra.checkpoints import find_checkpoint

WEIGHTS = (".json", ".safetensors", ".bin", ".model")
LARGE = 100 << 20  # reading a 13B model twice takes a minute


class CheckpointError(ValueError):
    """A checkpoint that is neither on the disk nor to be had; the message names it."""


def require_checkpoint(name: str) -> str:
    """Like :func:`libra.checkpoints.find_checkpoint`; raises CheckpointError where the weights can be had from nowhere."""
    found = find_checkpoint(name)
    if os.path.isdir(found):
        if not (Path(found) / "config.json").is_file():
            raise CheckpointError(f"checkpoint {name} has no config.json: name the folder that save_pretrained wrote")
        return str(Path(found).resolve())
    if found.startswith("mini/"):
        raise CheckpointError(f"checkpoint {name} is missing: train it with `bash scripts/train_mini.sh`")
    from huggingface_hub import HfApi, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(found, "config.json"), str):
        return found
    try:
        HfApi().model_info(found, timeout=10)
    except Exception as error:  # the hub's client raises its own, httpx's and the system's errors
        raise CheckpointError(
            f"checkpoint {found} is not in the local cache and the model hub does not give it ({type(error).__name__}): "
            "connect to the internet, or give a local copy with --checkpoint FOLDER"
        ) from None
    return found


def checkpoint_hash(found: str) -> str:
    """sha256 of a folder's files (of large ones only name and size), or of a hub name: what a stored answer depends on."""
    digest = hashlib.sha256()
    if not os.path.isdir(found):
        digest.update(found.encode())
        return digest.hexdigest()
    for path in sorted(path for path in Path(found).rglob("*") if path.is_file() and path.suffix in WEIGHTS):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(found)} {size}\n".encode())
        if size < LARGE:
            digest.update(path.read_bytes())
    return digest.hexdigest()
