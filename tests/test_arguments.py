"""What decoder layers get for fewer columns: arguments found by their shape, and masks that a model made
itself."""

import pytest
import torch

from libra.engine.layers import Arguments
from libra.engine.masks import shortened_mask

SOURCE = torch.tensor(
    [[0, 2, 3, 3, 5], [1, 2, 4, 4, 5]]
)  # of six columns; a compensation token repeats its source
ROWS = torch.arange(2)[:, None]


def shortened(value, length: int = 6):
    arguments = Arguments(length)
    assert arguments.fit(value) is value  # before anything was shortened
    arguments.shorten(SOURCE)
    return arguments.fit(value)


def test_arguments_with_an_entry_for_each_column():
    ids, kinds, axes = torch.arange(12).view(2, 6), torch.arange(6)[None], torch.arange(36).view(3, 2, 6)
    assert torch.equal(shortened(ids), ids[ROWS, SOURCE])
    assert torch.equal(shortened(kinds), kinds.expand(2, -1)[ROWS, SOURCE])
    assert torch.equal(shortened(torch.arange(6)), kinds.expand(2, -1)[ROWS, SOURCE])
    assert torch.equal(shortened(axes), axes[:, ROWS, SOURCE])
    table, each = torch.randn(1, 6, 4), torch.randn(2, 6, 4)
    cos, sin = shortened((table, each))
    assert torch.equal(cos, table.expand(2, -1, -1)[ROWS, SOURCE]) and torch.equal(sin, each[ROWS, SOURCE])
    by_axis = torch.randn(3, 2, 6, 4)
    assert torch.equal(shortened(by_axis), by_axis[:, ROWS, SOURCE])
    turned = torch.polar(torch.ones(1, 6, 2), torch.randn(1, 6, 2))
    assert torch.equal(shortened({"freqs": turned})["freqs"], turned.expand(2, -1, -1)[ROWS, SOURCE])


@pytest.mark.parametrize(
    "value",
    [None, True, 3, "words", torch.tensor(2), torch.ones(2, 5, 4), torch.arange(4)],
    ids=["none", "flag", "number", "words", "scalar", "longer", "shorter"],
)
def test_other_arguments_stay(value):
    assert shortened(value) is value


def test_arguments_are_gathered_once_a_stage_and_from_the_call_itself():
    arguments, ids = Arguments(6), torch.arange(12).view(2, 6)
    arguments.shorten(SOURCE)
    assert arguments.fit(ids) is arguments.fit(ids)
    arguments.shorten(torch.tensor([[0, 4], [1, 3]]))
    assert torch.equal(arguments.fit(ids), torch.tensor([[0, 5], [8, 10]]))


def seen(rows: str) -> torch.Tensor:
    """(1, 1, S, S) bool from lines of x and dots."""
    return torch.tensor([[c == "x" for c in row] for row in rows.split()])[None, None]


CAUSAL = seen("x..... xx.... xxx... xxxx.. xxxxx. xxxxxx")
IMAGE = seen("x..... xxxxx. xxxxx. xxxxx. xxxxx. xxxxxx")  # columns 1 to 4 see each other
FLOAT = pytest.mark.parametrize("as_float", [False, True], ids=["bool", "float"])


def given(mask: torch.Tensor, as_float: bool) -> torch.Tensor:
    if not as_float:
        return mask
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


@FLOAT
@pytest.mark.parametrize("whole, want", [
    (CAUSAL, "x.... xx... xxx.. xxxx. xxxxx"),
    (IMAGE, "x.... xxxx. xxxx. xxxx. xxxxx"),
], ids=["causal", "image"])  # fmt: skip
def test_a_ready_made_mask_for_fewer_columns(whole, want, as_float):
    """The columns 0, 2, 3, a compensation token of 3 and 5: it sees the token before it, which sees it
    only where pictures see all of themselves."""
    got = shortened_mask(given(whole, as_float), SOURCE[:1], None, None, 0, None)
    assert torch.equal(got, given(seen(want), as_float))


@FLOAT
def test_padding_and_earlier_keys_of_a_ready_made_mask(as_float):
    valid = torch.tensor([[False, True, True, True, True]])
    key_mask = torch.tensor([[True, False, False, True, True, True, True]])
    got = shortened_mask(given(IMAGE, as_float), SOURCE[:1], valid, key_mask, 2, None)
    want = torch.cat([seen("x. x. x. x. x."), seen("..... .xxx. .xxx. .xxx. .xxxx")], 3)
    assert torch.equal(got, given(want, as_float))


@FLOAT
def test_windows_of_a_ready_made_mask_count_the_columns_left(as_float):
    """A column sees two back, itself included; a picture's columns see each other all the same."""
    got = shortened_mask(given(CAUSAL, as_float), SOURCE[:1], None, None, 1, 2)
    want = torch.cat([seen("x . . . ."), seen("x.... xx... .xx.. ..xx. ...xx")], 3)
    assert torch.equal(got, given(want, as_float))
    got = shortened_mask(given(IMAGE, as_float), SOURCE[:1], None, None, 0, 2)
    assert torch.equal(got, given(seen("x.... xxxx. .xxx. .xxx. ...xx"), as_float))
