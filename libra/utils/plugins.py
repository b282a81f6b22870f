"""Python modules of the user's own that register a select or a merge.

They come in by three ways: `--import MODULE` of every command, a row's key `plugins` where `--allow-plugins`
was said, and packages that name one under the entry point group `libra.methods`. Nothing that a server or a
page is asked leads here.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from .sentences import ConfigError, one_line, show

GROUP = "libra.methods"
_loaded: dict[str, ModuleType] = {}  # by what the user called them
_allowed = False
_shut: ContextVar[bool] = ContextVar("libra_plugins_shut", default=False)


@contextmanager
def shut() -> Iterator[None]:
    """Within it, no configuration leads to an import: for what strangers ask of a server."""
    token = _shut.set(True)
    try:
        yield
    finally:
        _shut.reset(token)


def load(name: str) -> ModuleType:
    """Import a module by its dotted name, or a file that ends in `.py` by its path.

    Raises:
        ConfigError: where there is none, or it fails while it is imported.
    """
    if name not in _loaded:
        try:
            _loaded[name] = _of_file(Path(name)) if name.endswith(".py") else importlib.import_module(name)
        except (Exception, SystemExit) as error:
            kind = type(error).__name__
            raise ConfigError(
                f"the module {show(name)} cannot be imported ({kind}: {one_line(str(error))}); give a "
                "module's name that Python finds from here, or the path of its .py file"
            ) from error
    return _loaded[name]


def _of_file(path: Path) -> ModuleType:
    name = path.stem
    known = sys.modules.get(name)
    if known is not None:
        if getattr(known, "__file__", None) and Path(known.__file__).resolve() == path.resolve():
            return known
        raise ImportError(f"another module is called {name}; give the file another name")
    spec = importlib.util.spec_from_file_location(name, path.resolve(strict=True))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def loaded() -> tuple[str, ...]:
    """What :func:`load` has imported, so that another process can do the same; paths are absolute."""
    return tuple(str(Path(name).resolve()) if name.endswith(".py") else name for name in _loaded)


def flags() -> list[str]:
    """The words that make another command do what this one was told of plug-ins."""
    words = [word for name in loaded() for word in ("--import", name)]
    return [*words, "--allow-plugins"] if _allowed else words


def offered(name: str) -> bool:
    """Import the module of the installed entry point ``name``; False where no package has one or none may be
    imported."""
    if _shut.get():
        return False
    found = next(iter(entry_points(group=GROUP, name=name)), None)
    if found is None:
        return False
    load(found.module)
    return True


def allow() -> None:
    """From now on rows may name the modules that they need."""
    global _allowed
    _allowed = True


def of_row(names: Iterable[str], folder: Path) -> tuple[str, ...]:
    """The modules that a row names, imported; paths begin at the row's folder.

    Raises:
        ConfigError: where rows may not do that and the module has not been imported yet, or it cannot be.
    """
    found = tuple(str((folder / name).resolve()) if name.endswith(".py") else name for name in names)
    for name in found:
        if _shut.get() or not (_allowed or name in loaded() or name in sys.modules):
            raise ConfigError(
                f"plugins: {show(name)} is code of its own, which runs only where you say --allow-plugins (or"
                " import it yourself with --import)"
            )
        load(name)
    return found
