"""Configuration files: YAML with plain values only, read so that no text can run code, fill memory or end in
a traceback."""

import stat
from pathlib import Path
from typing import Any

import yaml

from .sentences import ConfigError, did_you_mean, show

LARGEST = 1 << 16  # bytes of a file
DEEPEST = 20  # lists and mappings within each other
LONGEST_NUMBER = 400  # characters
_PREFIX = "tag:yaml.org,2002:"
_NUMBERS = ("int", "float")
_TEXTS = ("str", "timestamp", "value")  # a date is text here, and so is a lone =


class _Loader(yaml.SafeLoader):
    """PyYAML's parser and composer; aliases and depth are refused before they cost anything."""

    depth = 0

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise _Refused(
                f"the alias *{show(event.anchor)} is not taken; write the value out", event.start_mark
            )
        if self.depth == DEEPEST:
            problem = f"there are more than {DEEPEST} lists and mappings within each other; no key is as deep"
            raise _Refused(problem, self.peek_event().start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Refused(yaml.MarkedYAMLError):
    """Something that YAML allows and a configuration does not."""

    def __init__(self, problem: str, mark):
        super().__init__(problem=problem, problem_mark=mark)


def load(path: str | Path) -> dict[Any, Any]:
    """A YAML file's top mapping, made of dict, list, str, int, float, bool and None.

    Raises ConfigError for a missing or unreadable file, for one that is not a regular file, not YAML or
    larger than `LARGEST`, for tags, aliases, merge keys and keys that are written twice; the sentence names
    the file, and the line or the key.
    """
    path = Path(path)
    try:
        regular = stat.S_ISREG(path.stat().st_mode)  # a pipe would keep us waiting, a device has no end
        content = _content(path) if regular else b""
    except FileNotFoundError:
        others = [other.name for other in path.parent.glob("*.yaml")]
        raise ConfigError(
            f"{path}: there is no such file;{did_you_mean(path.name, others) or ' check the path'}"
        ) from None
    except (OSError, ValueError) as error:  # a ValueError for a zero byte in the name
        raise ConfigError(
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); give a YAML file"
        ) from None
    if not regular:
        raise ConfigError(f"{path}: cannot be read (it is not a regular file); give a YAML file")
    if len(content) > LARGEST:
        raise ConfigError(f"{path}: is larger than {LARGEST >> 10} KB; a configuration is a short YAML text")
    mapping = _parse(content, path)
    if not isinstance(mapping, dict):
        raise ConfigError(
            f"{path}: holds no keys; write a mapping such as `method: libra` with `layers: [7, 15, 23]`"
        )
    return mapping


def _content(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(LARGEST + 1)


def _parse(content: bytes, path: Path) -> Any:
    loader = None
    try:
        loader = _Loader(content.decode("utf-8"))
        node = loader.get_single_node()
        return None if node is None else _plain(loader, node, "")
    except yaml.MarkedYAMLError as error:
        where = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise ConfigError(
            f"{path}: is not valid YAML: {error.problem[:200]}{where}; correct that line"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError):  # bytes that are no text, or control characters
        raise ConfigError(
            f"{path}: is not a plain text file in UTF-8; a configuration is a YAML text"
        ) from None
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply; a configuration is a short YAML text") from None
    finally:
        if loader is not None:
            loader.dispose()


def _plain(loader: _Loader, node: yaml.Node, key: str) -> Any:
    """The value of a node; `key` is the innermost one that it belongs to, for the sentence."""
    if isinstance(node, yaml.MappingNode) and node.tag == _PREFIX + "map":
        return _mapping(loader, node, key)
    if isinstance(node, yaml.SequenceNode) and node.tag == _PREFIX + "seq":
        return [_plain(loader, item, key) for item in node.value]
    kind = node.tag.removeprefix(_PREFIX)
    if isinstance(node, yaml.ScalarNode):
        if kind in _TEXTS:
            return node.value
        if kind in ("null", "bool") and node.value.lower() in ("", "~", "null", *loader.bool_values):
            return loader.construct_yaml_null(node) if kind == "null" else loader.construct_yaml_bool(node)
        if kind in _NUMBERS:
            return _number(loader, node, kind, key)
    raise _Refused(
        f"{_of(key)}the tag {show(node.tag)} is not taken here; write the plain value", node.start_mark
    )


def _mapping(loader: _Loader, node: yaml.MappingNode, outer: str) -> dict[Any, Any]:
    mapping = {}
    for key_node, value_node in node.value:
        if key_node.tag == _PREFIX + "merge":
            raise _Refused("the merge key << is not taken; write the keys out", key_node.start_mark)
        key = _plain(loader, key_node, outer)
        if isinstance(key, (list, dict)):
            raise _Refused(f"{show(key)} cannot be a key; write a name", key_node.start_mark)
        if key in mapping:
            raise _Refused(f"the key {show(key)} is written twice", key_node.start_mark)
        mapping[key] = _plain(loader, value_node, show(key))
    return mapping


def _number(loader: _Loader, node: yaml.ScalarNode, kind: str, key: str) -> int | float:
    if len(node.value) <= LONGEST_NUMBER:
        try:
            return loader.construct_yaml_int(node) if kind == "int" else loader.construct_yaml_float(node)
        except (ValueError, IndexError, OverflowError):  # a tag on what is not a number, such as !!int ""
            pass
    raise _Refused(f"{_of(key)}{show(node.value)} is not a number that can be read", node.start_mark)


def _of(key: str) -> str:
    return f"{key}: " if key else ""
