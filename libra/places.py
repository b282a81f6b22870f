"""Where a compression happens: in the vision tower, at the language model's input, or after decoder
layers."""

from typing import Any

from .utils.numbers import is_whole
from .utils.sentences import ConfigError, show

TOWER, INPUT, LAYERS = "tower", "input", "layers"
# Among the numbers of layers: the place before layer 0. What the tower shortens is shorter there too.
BEFORE = -1
IN_WORDS = {
    TOWER: "in the vision tower, before the model's projector",
    INPUT: "before the language model",
    LAYERS: "after decoder layers",
}


def place_name(layer: int) -> str:
    """A layer of a schedule in a list of them: its number, or "input"."""
    return "input" if layer == BEFORE else str(layer)


def place_and_layers(at: Any, layers: Any) -> tuple[str | None, Any]:
    """The keys `at` and `layers` of a compression as a place before the language model and layers, one of
    which is None; both where neither is given. The layers are not checked.

    Raises ConfigError where both are given and do not say the same, or `at` is not a place.
    """
    if layers == INPUT or isinstance(layers, (list, tuple)) and list(layers) == [BEFORE]:
        if at not in (None, INPUT, TOWER):
            raise ConfigError(f"at: {show(at)} and layers: {show(layers)} both say where; remove one")
        return at or INPUT, None
    if at is None:
        return None, layers
    if layers is not None:
        raise ConfigError(f"at: {show(at)} and layers: {show(layers)} both say where; remove one")
    if at in (TOWER, INPUT):
        return at, None
    if is_whole(at):
        return place_and_layers(None, [at])
    if isinstance(at, (list, tuple, range)):
        return place_and_layers(None, list(at))
    raise ConfigError(
        f"at: {show(at)} is not a place; write tower, input, or the number of a layer such as 15"
    )
