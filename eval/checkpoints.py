"""Whether a model's weights can be had."""

import os
from pathlib import Path

from libra.checkpoints import find_checkpoint, hub_file


class CheckpointError(ValueError):
    """A checkpoint that is neither on the disk nor to be had; the message names it."""


def require_checkpoint(name: str) -> str:
    """Like :func:`libra.checkpoints.find_checkpoint`; raises CheckpointError where the weights can be had
    from nowhere."""
    found = find_checkpoint(name)
    if os.path.isdir(found):
        if not (Path(found) / "config.json").is_file():
            raise CheckpointError(
                f"checkpoint {name} has no config.json: name the folder that save_pretrained wrote"
            )
        return str(Path(found).resolve())
    if found.startswith("mini/"):
        raise CheckpointError(f"checkpoint {name} is missing: train it with `bash scripts/train_mini.sh`")
    try:
        hub_file(found, "config.json")
    except Exception as error:  # the hub's client raises its own, httpx's and the system's errors
        raise CheckpointError(
            f"checkpoint {found} is not in the local cache and the model hub does not give it "
            f"({type(error).__name__}): connect to the internet, or give a local copy with --checkpoint "
            "FOLDER"
        ) from None
    return found
