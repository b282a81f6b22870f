"""A training run and its folder: what defines it, which of its checkpoints are whole, and from where it goes
on.

``run.json`` in the output folder says what the run is made of. Each checkpoint gets a seal when all of it is
on the disk; one without, or whose files are not those of its seal, was torn by a kill or a full disk and
gives way to the newest whole one.
"""

import hashlib
import json
import re
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

from libra.identity import digest
from libra.utils.files import flush_tree, write_text
from libra.utils.sentences import show

from ..model.weights import ADAPTERS, PROJECTOR, has_weights, weight_files

RECORD = "run.json"
SEAL = "whole.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,12})")
_SHA = "sha256:"
_SAMPLED = 1 << 20  # bytes read of a large file at its start, in its middle and at its end


@dataclass(frozen=True)
class Run:
    """A training run: its output folder and everything that its weights depend on, under names that a user
    knows."""

    folder: Path
    identity: dict[str, object]

    @property
    def digest(self) -> str:
        return digest(self.identity)

    def check(self) -> bool:
        """See that the output folder is free or holds this very run; True if that is finished.

        Raises:
            ValueError: with what is different, or if the folder holds a model of unknown origin.
        """
        path = self.folder / RECORD
        if not path.is_file():
            if holds_model(self.folder) or any(self.folder.glob("checkpoint-*/trainer_state.json")):
                raise ValueError(
                    f"--output_dir {self.folder} holds a model or checkpoints, and no {RECORD} that says of "
                    "which run; name another one, or empty it"
                )
            return False
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            before = dict(record["run"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} cannot be read; name another --output_dir, or empty this one"
            ) from error
        now = json.loads(json.dumps(self.identity))
        changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if changed:
            told = "; ".join(_change(name, before.get(name), now.get(name)) for name in changed)
            raise ValueError(
                f"--output_dir {self.folder} holds another run: {told}. Give what it began with to go on, or "
                "name another --output_dir"
            )
        return bool(record.get("finished")) and holds_model(self.folder)

    def write(self, finished: bool = False) -> None:
        record = {"run": self.identity, "finished": finished}
        write_text(self.folder / RECORD, json.dumps(record, indent=1, sort_keys=True) + "\n")

    def checkpoints(self) -> list[Path]:
        """The checkpoints of the folder, whole or not, in the order of their steps."""
        return _checkpoints(self.folder)

    def seal(self, checkpoint: Path) -> None:
        """Have a finished checkpoint on the disk and mark it as whole."""
        (checkpoint / SEAL).unlink(missing_ok=True)  # of an earlier checkpoint of the same step
        flush_tree(checkpoint)
        write_text(
            checkpoint / SEAL, json.dumps({"run": self.digest, "files": _sizes(checkpoint)}, indent=1) + "\n"
        )

    def is_whole(self, checkpoint: Path) -> bool:
        """Whether a checkpoint is of this run and all its files are as they were written."""
        try:
            seal = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
            sizes = _sizes(checkpoint)
            return seal["run"] == self.digest and all(
                sizes.get(name) == size for name, size in seal["files"].items()
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False

    def newest(self) -> Path | None:
        """The newest whole checkpoint."""
        return next((path for path in reversed(self.checkpoints()) if self.is_whole(path)), None)

    def torn(self) -> list[Path]:
        """The checkpoints that are newer than the newest whole one; one with another run's seal is not among
        them."""
        newest, found = self.newest(), self.checkpoints()
        newer = found if newest is None else found[found.index(newest) + 1 :]
        return [path for path in newer if _sealed_by(path) in (None, self.digest)]

    def keep(self, limit: int | None) -> None:
        """Remove whole checkpoints but for the newest ``limit``; None keeps all, and what is not this run's
        is not touched."""
        for path in [path for path in self.checkpoints() if self.is_whole(path)][: -limit if limit else 0]:
            (path / SEAL).unlink()  # half removed it is not whole
            shutil.rmtree(path, ignore_errors=True)


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint of a training without seals, such as transformers' own Trainer writes, that looks
    whole."""
    return next((str(path) for path in reversed(_checkpoints(Path(folder))) if _looks_whole(path)), None)


def _looks_whole(checkpoint: Path) -> bool:
    """Whether the state, which is written last, can be read, no file is empty, and none of torch's is cut
    short."""
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    if not all(path.stat().st_size for path in files):
        return False
    if not all(zipfile.is_zipfile(path) for path in files if path.suffix in (".pt", ".pth")):
        return False
    try:
        return "global_step" in json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _checkpoints(folder: Path) -> list[Path]:
    found = [
        (int(match[1]), path)
        for path in folder.glob("checkpoint-*")
        if (match := _CHECKPOINT.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found)]


def holds_model(folder: Path) -> bool:
    """Whether a folder holds a finished model, projector or adapter."""
    return has_weights(folder) or any((folder / name).is_file() for name in (PROJECTOR, *ADAPTERS))


def digest_of(content: bytes) -> str:
    """A digest as it stands in an identity."""
    return _SHA + hashlib.sha256(content).hexdigest()


def digest_of_model(folder: Path) -> str:
    """Of a model's folder: its config.json, and the names, sizes and samples of its weight files."""
    weights = weight_files(folder) if has_weights(folder) else ()
    return digest_of((folder / "config.json").read_bytes() + b"".join(map(_sample, weights)))


def _sample(path: Path) -> bytes:
    """Name, size, start, middle and end of a file: all of it would take minutes for a large model."""
    size = path.stat().st_size
    parts = [f"{path.name} {size}\n".encode()]
    with path.open("rb") as file:
        for start in (0, size // 2, max(0, size - _SAMPLED)):
            file.seek(start)
            parts.append(file.read(_SAMPLED))
    return b"".join(parts)


def _sealed_by(checkpoint: Path) -> str | None:
    """The digest of the run in a checkpoint's seal; None where there is none that can be read."""
    try:
        return json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))["run"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sizes(folder: Path) -> dict[str, int]:
    """The bytes of each file in a folder, by its name in it; without the seal."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _change(name: str, before, now) -> str:
    """What is different, for a user."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        return ", ".join(_change(f"{name} {key}", before.get(key), now.get(key)) for key in keys)
    if str(before).startswith(_SHA) and str(now).startswith(_SHA):
        return f"what {name} holds has changed"
    return f"{name} was {_word(before)} and is {_word(now)}"


def _word(value) -> str:
    if value is None:
        return "not given"
    return "another file" if str(value).startswith(_SHA) else show(value)
