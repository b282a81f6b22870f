"""What an answer depends on besides the question: the checkpoint's contents and the code, as digests that
know no paths."""

import ast
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path

from .checkpoints import find_tower, hub_file
from .config import Compression
from .methods import MERGERS, SELECTORS
from .rows import Row, get_model
from .utils.files import write_text

LARGE = 64 << 20  # bytes from which a file's digest is remembered
# Files of a checkpoint's folder that nobody reads who answers with it.
IDLE = (
    "*.md",
    "*.png",
    "*.jpg",
    "*.jpeg",
    "*.pdf",
    "LICENSE*",
    "NOTICE*",
    "trainer_state.json",
    "training_args.bin",
    "run.json",
    "samples.json",
    "optimizer.*",
    "scheduler.*",
    "rng_state*",
    "scaler.pt",
)
IDLE_FOLDERS = ("checkpoint-*", "runs")  # earlier states of a training, and its curves
ROLES = {  # package → its parts that have no part in an answer
    "libra": ("checkpoints", "figures", "flops", "identity", "latency", "serve", "utils", "vllm"),
    "llava": ("convert", "eval", "serve", "train"),
}


# Values and files.


def digest(settings: object) -> str:
    """sha256 of JSON values, the same for equal ones whatever the order of their keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file's contents.

    That of a large file is remembered in the user's cache folder, by size, times and inode, so it is read
    once.
    """
    status = path.stat()
    if status.st_size < LARGE:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    which = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "libra-merging" / "digests"
    remembered = folder / digest(which)
    try:
        found = remembered.read_text(encoding="ascii")
        if len(found) == 64:
            return found
    except (OSError, ValueError):
        pass
    found = _read_large(path, status.st_size)
    try:
        if path.stat().st_mtime_ns == status.st_mtime_ns:  # nobody wrote to it meanwhile
            write_text(remembered, found)
    except OSError:
        pass  # a cache folder that cannot be written: read again the next time
    return found


def _read_large(path: Path, size: int) -> str:
    from tqdm import tqdm

    digest = hashlib.sha256()
    with (
        open(path, "rb") as file,
        tqdm(
            total=size, desc=f"digest of {path.name}", unit="B", unit_scale=True, delay=2, leave=False
        ) as bar,
    ):
        while block := file.read(8 << 20):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def folder_digest(folder: Path) -> str:
    """sha256 of the names and contents of a checkpoint's files, in inner folders and behind links too."""
    digest = hashlib.sha256()
    for name, path in sorted(_files(folder)):
        digest.update(f"{name} {file_digest(path)}\n".encode())
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(name inside folder, path) of the files that count."""
    entered = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in entered:  # a link to a folder above
            folders.clear()
            continue
        entered.add(real)
        folders[:] = [name for name in folders if not _is_idle(name, IDLE_FOLDERS)]
        for name in names:
            path = Path(place, name)
            if path.is_file() and not _is_idle(name, IDLE):
                yield path.relative_to(folder).as_posix(), path


def _is_idle(name: str, patterns: tuple[str, ...]) -> bool:
    return name.startswith(".") or any(fnmatch(name, pattern) for pattern in patterns)


# Rows and checkpoints.


def row_identity(row: Row) -> dict:
    """What a table's row does to its model, in JSON values. A method's name only says the keys that are there
    as well."""
    compression = row.compression.to_dict() if row.compression.compresses else {"layers": []}
    compression.pop("method", None)
    conversation = (
        get_model(row.model, row.path).conversation if row.model else None
    )  # None: the checkpoint's own
    identity = {
        "model": row.model,
        "conversation": conversation,
        "compression": compression,
        "attention": row.attention,
    }
    own = _own_code(row.compression)
    return identity | {"own": own} if own else identity


def _own_code(c: Compression) -> dict[str, str]:
    """Module → digest of its file, of the modules outside of this package that the row's select and merge
    come from. What they import in their turn is not looked at."""
    entries = [entry for part in c.parts for entry in (SELECTORS[part.select], MERGERS[part.merge])]
    modules = {entry.function.__module__ for entry in entries} if c.compresses else set()
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in modules}
    return {
        name: file_digest(Path(file))
        for name, file in sorted(files.items())
        if file and name.partition(".")[0] != "libra"
    }


def checkpoint_identity(found: str) -> dict:
    """What :func:`libra.checkpoints.find_checkpoint` found: of a folder ``{"sha256": …}``, of a hub name
    ``{"hub": name, "revision": commit}``; and ``tower``, likewise, where its vision tower lies elsewhere.

    Raises the hub client's errors where a hub name is neither in the local cache nor to be had.
    """
    if os.path.isdir(found):
        folder = Path(found)
        identity: dict = {"sha256": folder_digest(folder)}
    else:
        config = hub_file(found, "config.json")
        folder = config.parent
        identity = {"hub": found, "revision": folder.name}
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = settings.get("mm_vision_tower")
    except (OSError, ValueError, AttributeError):
        name = None  # whoever loads it says what is wrong
    if isinstance(name, str) and name:
        tower = find_tower(name, folder) or find_tower(name, Path.cwd())
        if tower is None:
            identity["tower"] = {"hub": name, "revision": hub_revision(name)}
        elif not tower.resolve().is_relative_to(folder.resolve()):
            identity["tower"] = {"sha256": folder_digest(tower)}
    return identity


@cache
def hub_revision(name: str, file: str = "config.json", kind: str = "model") -> str | None:
    """The commit of a repository on the hub that a program would get now; None where it is not to be had."""
    try:
        return hub_file(name, file, kind).parent.name
    except Exception:  # the hub's client raises its own, httpx's and the system's errors
        return None


# Code.


def code_identity(**more: list[Path]) -> dict[str, str]:
    """Package → :func:`code_digests` of the files in it that take part in an answer; ``more``: files of other
    packages."""
    files = dict(more)
    for package, others in ROLES.items():
        folder = Path(find_spec(package).origin).parent
        names = (path.relative_to(folder) for path in sorted(folder.rglob("*.py")))
        files[package] = [folder / name for name in names if name.parts[0].removesuffix(".py") not in others]
    return code_digests(files)


def code_digests(files: dict[str, list[Path]]) -> dict[str, str]:
    """Package → sha256 of what its Python files say, wherever it stands: the set of their statements, without
    comments, docstrings, layout and the modules that the project's own imports name.

    So files can be moved, split and put together. A name that several files define counts with its module,
    since another one is imported if that changes.
    """
    states = {path: path.stat() for paths in files.values() for path in paths}
    key = tuple((path, state.st_mtime_ns, state.st_size, state.st_ino) for path, state in states.items())
    return dict(_code_digests(tuple((package, tuple(paths)) for package, paths in files.items()), key))


@lru_cache(maxsize=1)
def _code_digests(files: tuple[tuple[str, tuple[Path, ...]], ...], state: tuple) -> dict[str, str]:
    """``state``: of the files; what was told of them holds while it is the same."""
    modules = {package: [ast.parse(path.read_bytes()) for path in paths] for package, paths in files}
    defined = Counter(name for trees in modules.values() for tree in trees for name in _defined(tree))
    digests = {}
    for role, trees in modules.items():
        told = {
            _told(node, tuple(modules), defined) for tree in trees for node in tree.body if not _is_text(node)
        }
        told.discard("")  # imports of what has one definition
        parts = sorted(hashlib.sha256(text.encode()).hexdigest() for text in told)
        digests[role] = hashlib.sha256("".join(parts).encode()).hexdigest()
    return digests


def _defined(module: ast.Module) -> Iterator[str]:
    for node in module.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def _is_text(node: ast.AST) -> bool:
    """A docstring, or another string that does nothing."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _told(node, own: tuple[str, ...], defined: Counter) -> str:
    """A syntax tree as text, the same in every version of Python; "" for an import that says nothing."""
    if isinstance(node, list):
        return f"[{','.join(_told(one, own, defined) for one in node if not _is_text(one))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.ImportFrom) and (node.level or node.module.partition(".")[0] in own):
        return ",".join(_imported(alias, node.module or "", defined) for alias in node.names).strip(",")
    parts = [
        f"{name}={_told(value, own, defined)}"
        for name, value in ast.iter_fields(node)
        if value not in (None, [])
    ]
    return f"{type(node).__name__}({','.join(parts)})"


def _imported(alias: ast.alias, module: str, defined: Counter) -> str:
    if defined[alias.name] > 1:
        return f"{module.rpartition('.')[2]}.{alias.name} as {alias.asname}"
    return f"{alias.name} as {alias.asname}" if alias.asname else ""
