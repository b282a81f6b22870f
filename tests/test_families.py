"""All eight families under libra.attach: the grid of choices against the computation by hand, and the plain
model untouched."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, product

import families
import pytest
import tiny
import torch
from families import EVERY, SAID, by_hand, collate, talk

import libra
from libra import Compression
from libra.engine.tokens import VisualTokens
from libra.engine.trace import COMPENSATION
from libra.engine.transformers_api import cache_argument, cache_of

CLOSE = dict(atol=1e-4, rtol=1e-4)
LAYERS = (1, 3)
SELECTS = ("intervals", "topk", "random", "information")
MERGES = ("drop", "average", "igm", "igm-pos", "igm-neg")
LIBRA = Compression(method="libra", layers=LAYERS, tau=0.6)  # among these similarities both sets have members
PATTERNS = ("t2 v t3 i t4", "t4 i t5", "t6")
STEPS = 3
every_decoder = pytest.mark.parametrize(
    "family, text", EVERY, ids=lambda value: value.replace("ForConditionalGeneration", "")
)
every_family = pytest.mark.parametrize(
    "family", families.KINDS, ids=lambda value: value.replace("ForConditionalGeneration", "")
)
both_sides = pytest.mark.parametrize("side", ["left", "right"])


def talks_of(family: str, patterns=PATTERNS) -> list[families.Talk]:
    return [talk(family, pattern, seed) for seed, pattern in enumerate(patterns)]


def runs(visual: torch.Tensor) -> list[int]:
    """The lengths of a row's contiguous runs of visual tokens."""
    return [len(run) for run in "".join("v" if v else " " for v in visual.tolist()).split()]


def schedule(visual: torch.Tensor, c: Compression, layers: int = 6) -> list[int]:
    """What each layer should see of a row, read from §3.1: every run by itself, at least one token of it."""
    left, counts = runs(visual), []
    for layer in range(layers):
        counts.append(sum(left))
        if layer in c.layers:
            left = [max(1, round((1 - c.ratio) * n)) for n in left]
    return counts


@dataclass
class Seam:
    """One compression step: hidden states before and after it (B, S, D), and their visual and valid columns
    (B, S)."""

    before: torch.Tensor
    visual: torch.Tensor
    valid: torch.Tensor
    after: torch.Tensor
    visual_after: torch.Tensor
    valid_after: torch.Tensor
    compensated: list[bool]

    def text(self, b: int) -> torch.Tensor:
        return self.before[b][self.valid[b] & ~self.visual[b]]

    def text_after(self, b: int) -> torch.Tensor:
        """Without the compensation token, which is the column after the last visual one."""
        others = self.valid_after[b] & ~self.visual_after[b]
        if self.compensated[b]:
            others[self.visual_after[b].nonzero()[-1] + 1] = False
        return self.after[b][others]


@contextmanager
def seams() -> Iterator[list[Seam]]:
    seen, compress = [], VisualTokens.compress

    def state(tokens):
        visual = tokens.spans > 0
        return visual, torch.ones_like(visual) if tokens.valid is None else tokens.valid

    def spy(tokens, hidden, attention):
        before = (hidden, *state(tokens))
        result = compress(tokens, hidden, attention)
        seen.append(Seam(*before, result[0], *state(tokens), result[2].compensated))
        return result

    VisualTokens.compress = spy
    try:
        yield seen
    finally:
        VisualTokens.compress = compress


# --- the matrix ---


def pairwise(*axes: tuple) -> list[tuple]:
    """Rows in which every pair of values of two axes occurs: greedily, always the same."""
    places = list(combinations(range(len(axes)), 2))
    missing = {
        (i, j, a, b): None for i, j in places for a in axes[i] for b in axes[j]
    }  # a set that keeps its order
    rows = []
    while missing:
        i, j, a, b = next(iter(missing))
        row = {i: a, j: b}
        for k in (k for k in range(len(axes)) if k not in row):
            row[k] = max(
                axes[k],
                key=lambda value: sum(
                    (*sorted((k, other)), *((value, row[other]) if k < other else (row[other], value)))
                    in missing
                    for other in row
                ),
            )
        rows.append(tuple(row[k] for k in range(len(axes))))
        for i, j in places:
            missing.pop((i, j, rows[-1][i], rows[-1][j]), None)
    return rows


AXES = (tuple(EVERY), SELECTS, MERGES, ("left", "right"), (1, 3))


def test_pairwise_covers_every_pair():
    rows = pairwise(*AXES)
    assert len(rows) < 100 and len(set(rows)) == len(rows)
    for i, j in combinations(range(len(AXES)), 2):
        assert {(row[i], row[j]) for row in rows} == set(product(AXES[i], AXES[j]))


@torch.no_grad()
def check(decoder: tuple[str, str], select: str, merge: str, side: str, batch: int) -> None:
    """One cell of the matrix."""
    family, text = decoder
    c = Compression(select=select, merge=merge, layers=LAYERS, **({"tau": 0.6} if merge == "igm" else {}))
    model, twin, talks = (
        families.model(family, text),
        families.model(family, text, "eager"),
        talks_of(family)[:batch],
    )
    given = collate(family, talks, side)
    with libra.attach(model, c, trace=True) as handle:
        with seams() as seen:
            out = model(**given, output_hidden_states=True)
        stats, traces = handle.stats, handle.trace
        again = model(**given).logits
        singles = [model(**collate(family, [t])).logits[0] for t in talks]
        said = None
        if side == "left" or batch == 1:
            said = model.generate(
                **given, max_new_tokens=STEPS, **SAID, return_dict_in_generate=True, output_logits=True
            )

    assert out.logits.isfinite().all() and torch.equal(out.logits, again)
    wanted = [schedule(t.visual, c) for t in talks]
    assert list(map(list, zip(*stats["visual_tokens"], strict=True))) == wanted
    added = [[int((stage.fate == COMPENSATION).any()) for stage in row.stages] for row in traces]
    assert [stats["compensation_tokens"][layer] for layer in c.layers] == list(
        map(list, zip(*added, strict=True))
    )
    widths = [
        max(
            int((~t.visual).sum()) + counts[layer] + sum(a for a, at in zip(extra, c.layers) if at < layer)
            for t, counts, extra in zip(talks, wanted, added)
        )
        for layer in range(6)
    ]
    assert [state.shape[1] for state in out.hidden_states[1:-1]] == widths[:-1]
    assert out.logits.shape[1] == widths[-1] < widths[0]

    assert len(seen) == len(c.layers)
    for number, seam in enumerate(seen):
        for b, t in enumerate(talks):
            assert torch.equal(seam.text(b), seam.text_after(b))
            assert len(seam.text(b)) == int((~t.visual).sum()) + sum(added[b][:number])

    for b, t in enumerate(talks):
        ids = [] if said is None else said.sequences[b, -STEPS:].tolist()
        hand = by_hand(twin, family, t, c, ids[:-1]).logits
        prompt = hand[: len(hand) - max(0, len(ids) - 1)]
        torch.testing.assert_close(tiny.own(out.logits[b], len(prompt), side), prompt, **CLOSE)
        torch.testing.assert_close(singles[b], prompt, **CLOSE)
        if said is not None:
            torch.testing.assert_close(torch.stack(said.logits, 1)[b], hand[-STEPS:], **CLOSE)


@pytest.mark.parametrize("cell", pairwise(*AXES), ids=lambda cell: "-".join(map(str, (*cell[0], *cell[1:]))))
def test_matrix_pairwise(cell):
    check(*cell)


@pytest.mark.slow
@pytest.mark.parametrize("select, merge", list(product(SELECTS, MERGES)))
@every_decoder
def test_matrix_in_full(family, text, select, merge):
    for side, batch in product(*AXES[-2:]):
        check((family, text), select, merge, side, batch)


@pytest.mark.parametrize("pattern", ["i i t3", "t2 v i t1 v t4", "i t4 v v t2", "t3 i", "t1 i i v t1 i t2"])
@every_family
@torch.no_grad()
def test_pictures_in_any_order(family, pattern):
    """Several of each, side by side (one run where the family puts no marks between them), at the start and
    at the end."""
    t, model = talk(family, pattern, 7), families.model(family)
    with seams() as seen, libra.attach(model, LIBRA) as handle:
        logits = model(**collate(family, [t])).logits[0]
        assert [row[0] for row in handle.stats["visual_tokens"]] == schedule(t.visual, LIBRA)
    torch.testing.assert_close(
        logits, by_hand(families.model(family, "", "eager"), family, t, LIBRA).logits, **CLOSE
    )
    for seam in seen:
        assert torch.equal(seam.text(0), seam.text_after(0))


@pytest.mark.parametrize(
    "method", ["pyramiddrop", "mean of the instruction", "one layer", "after the last layer"]
)
@every_decoder
@torch.no_grad()
def test_further_choices(family, text, method):
    """Scores by the next layer and compact positions, where the family has one position a token; the mean of
    several rows."""
    keys = {
        "pyramiddrop": dict(method="pyramiddrop", layers=LAYERS),
        "mean of the instruction": dict(method="libra", layers=LAYERS, tau=0.6, importance="mean"),
        "one layer": dict(method="fastv", layers=(2,), ratio=0.75),
        "after the last layer": dict(method="turbo", layers=(1, 5)),
    }[method]
    model = families.model(family, text)
    if method == "pyramiddrop" and text == "own":
        with pytest.raises(
            ValueError, match="compact cannot renumber the multi-axis positions of Qwen.*positions: original"
        ):
            libra.attach(model, Compression(**keys))
        keys["positions"] = "original"
    c, talks = Compression(**keys), talks_of(family)
    with libra.attach(model, c):
        out = model.generate(
            **collate(family, talks),
            max_new_tokens=STEPS,
            **SAID,
            return_dict_in_generate=True,
            output_logits=True,
        )
    for b, t in enumerate(talks):
        hand = by_hand(
            families.model(family, text, "eager"), family, t, c, out.sequences[b, -STEPS:-1].tolist()
        ).logits
        torch.testing.assert_close(torch.stack(out.logits, 1)[b], hand[-STEPS:], **CLOSE)


def test_deep_features_come_before_the_compression():
    model = families.model("Qwen3VLForConditionalGeneration")
    with pytest.raises(
        ValueError, match="layers: 0 is too early: .* adds visual features after its layers 0 to 1"
    ):
        libra.attach(model, Compression(method="libra", layers=(0, 3)))


# --- the plain model ---


@dataclass
class Behaviour:
    """What a model does with a batch: logits of a prefill and of two steps after it, ids of greedy search
    and of beams."""

    logits: list[torch.Tensor]
    ids: list[torch.Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, model, family: str, talks) -> "Behaviour":
        left, right = collate(family, talks), collate(family, talks, "right")
        out = model(**left, use_cache=True)
        logits, mask = [out.logits, model(**right).logits], left["attention_mask"]
        for token in (5, 6):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            given = {"input_ids": torch.full((len(talks), 1), token), "attention_mask": mask}
            given["position_ids"] = mask.sum(1, keepdim=True) - 1
            if family.startswith("Qwen"):
                given["position_ids"] = given["position_ids"].expand(3, -1, -1)
            logits.append(model(**given, **cache_argument(cache_of(out)), use_cache=True).logits)
        options = dict(max_new_tokens=STEPS, do_sample=False)
        return cls(
            logits, [model.generate(**left, **options), model.generate(**left, **options, num_beams=2)]
        )

    def __eq__(self, other: "Behaviour") -> bool:
        pairs = zip(self.logits + self.ids, other.logits + other.ids, strict=True)
        return all(torch.equal(one, another) for one, another in pairs)


@pytest.mark.parametrize(
    "family, text, attention",
    [(*one, "sdpa") for one in EVERY] + [(family, "", "eager") for family in list(families.KINDS)[::3]],
)
def test_without_compression_and_afterwards_no_bit_differs(family, text, attention):
    model, talks = families.model(family, text, attention), talks_of(family)
    answered = collate(family, talks_of(family, ["t2 v t3 a2", "t4 i t5 a3", "t3 a1"]), "right", labels=True)
    plain, loss = Behaviour.of(model, family, talks), model(**answered).loss
    with libra.attach(model, Compression(method="vanilla")) as handle:
        assert Behaviour.of(model, family, talks) == plain
        assert torch.equal(model(**answered).loss, loss) and handle.stats is None
    with libra.attach(model, LIBRA):
        assert model(**answered).logits.shape[1] < plain.logits[0].shape[1]
    with pytest.raises(RuntimeError, match="on the way"), libra.attach(model, LIBRA):
        model(**answered)
        raise RuntimeError("on the way")
    assert Behaviour.of(model, family, talks) == plain
    assert torch.equal(model(**answered).loss, loss)
    assert model.model.language_model.config._attn_implementation == attention
    assert not model._forward_hooks and not model._forward_pre_hooks and not model.model._forward_pre_hooks


@both_sides
@every_decoder
@torch.no_grad()
def test_ratio_zero_at_every_layer_changes_no_bit(family, text, side):
    model, talks = families.model(family, text), talks_of(family, ["t2 v t3 i t1 a2", "t4 i t5 a3", "t3 a1"])
    layers = tuple(range(1 if "Qwen3VL" in family else 0, 6))
    given = collate(family, talks, side, labels=True)
    plain, valid = model(**given), given["attention_mask"].bool()
    for method in ("libra", "turbo", "random"):
        with (
            tiny.watched() as steps,
            libra.attach(model, Compression(method=method, layers=layers, ratio=0.0)),
        ):
            out = model(**given)
            assert len(steps) == len(layers)
            assert torch.equal(out.logits[valid], plain.logits[valid]) and torch.equal(out.loss, plain.loss)
    if side == "left":
        asked = collate(family, talks)
        said = model.generate(**asked, max_new_tokens=STEPS, do_sample=False)
        with libra.attach(model, Compression(method="fastv", layers=layers, ratio=0.0)):
            assert torch.equal(model.generate(**asked, max_new_tokens=STEPS, do_sample=False), said)


# --- the loss ---


@both_sides
@every_decoder
@torch.no_grad()
def test_the_loss_is_the_mean_over_the_rows_by_hand(family, text, side):
    """Each picture is scored by the column before the first answer after it."""
    talks = talks_of(family, ["t2 v t3 i t2 a2", "t1 i t2 a2 t3 v t2 a3", "t6 a4"])
    scorers = []
    for t in talks:
        answers, ends = (
            (t.labels != -100).nonzero().flatten(),
            (t.visual & ~torch.roll(t.visual, -1)).nonzero().flatten(),
        )
        scorers.append([int(answers[answers > end][0]) - 1 for end in ends])
    twin, model = families.model(family, text, "eager"), families.model(family, text)
    given = collate(family, talks, side, labels=True)
    total = sum(by_hand(twin, family, t, LIBRA, scorers=s).loss(t.labels) for t, s in zip(talks, scorers))
    with libra.attach(model, LIBRA):
        torch.testing.assert_close(model(**given).loss, total / 11, **CLOSE)
        torch.testing.assert_close(
            model(**given, num_items_in_batch=torch.tensor(22)).loss, total / 22, **CLOSE
        )
        loss, logits = model(**given, return_dict=False)[:2]
        torch.testing.assert_close(loss, total / 11, **CLOSE)
        assert logits.shape[1] < given["input_ids"].shape[1]


# --- the score row, and windows ---

WINDOWS = {
    "mistral": dict(sliding_window=8),
    "qwen2": dict(sliding_window=8, layer_types=["full_attention", "sliding_attention"] * 3),
    "own": dict(
        sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"] * 2
    ),
    "short": dict(sliding_window=8, layer_types=["full_attention"] * 2 + ["sliding_attention"] * 4),
}
WINDOWED = [
    ("LlavaForConditionalGeneration", "mistral", "mistral"),
    ("LlavaForConditionalGeneration", "qwen2", "qwen2"),
    ("LlavaForConditionalGeneration", "qwen2", "short"),
    ("LlavaNextForConditionalGeneration", "mistral", "mistral"),
    ("InternVLForConditionalGeneration", "qwen3", "qwen2"),
    ("Qwen2VLForConditionalGeneration", "own", "own"),
    ("Qwen2_5_VLForConditionalGeneration", "own", "short"),
]


def asked(step: tiny.Step, attentions: torch.Tensor) -> torch.Tensor:
    """Of attentions (B, H, S, S) the rows that a step's probe asked for, averaged over the heads: (B, R,
    S)."""
    mean = attentions.float().mean(1)
    return mean.gather(1, step.queries[..., None].expand(-1, -1, mean.shape[-1]))


def check_rows(model, twin, given: dict, tolerance: float) -> None:
    """At the first layer against the plain twin's attention, at the second against the compressed twin's."""
    c = Compression(select="intervals", merge="drop", layers=LAYERS)
    plain = twin(**given, output_attentions=True).attentions[LAYERS[0]]
    with tiny.watched() as steps, libra.attach(model, c):
        model(**given)
    torch.testing.assert_close(steps[0].attention, asked(steps[0], plain), atol=tolerance, rtol=0)
    with libra.attach(twin, c):
        later = twin(**given, output_attentions=True).attentions[LAYERS[1]]
    assert later.shape[-1] == steps[1].attention.shape[-1] < plain.shape[-1]
    torch.testing.assert_close(steps[1].attention, asked(steps[1], later), atol=tolerance, rtol=0)


@both_sides
@every_decoder
@torch.no_grad()
def test_the_score_row_is_eager_attentions_row(family, text, side):
    given = collate(family, talks_of(family), side)
    check_rows(families.model(family, text), families.model(family, text, "eager"), given, 1e-5)


@pytest.mark.parametrize("heads", [1, 4])
@torch.no_grad()
def test_the_score_row_of_other_groups_of_heads(heads):
    for family in ("LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration"):
        model, twin = (
            families.own_model(family, attention=a, num_key_value_heads=heads) for a in ("sdpa", "eager")
        )
        check_rows(model, twin, collate(family, talks_of(family)), 1e-5)


@pytest.mark.parametrize("family, text, windows", WINDOWED)
@both_sides
@torch.no_grad()
def test_the_score_row_under_windows(family, text, windows, side):
    model, twin = (families.own_model(family, text, a, **WINDOWS[windows]) for a in ("sdpa", "eager"))
    check_rows(model, twin, collate(family, talks_of(family), side), 1e-5)


@pytest.mark.parametrize("windows", [None, "mistral"])
@torch.no_grad()
def test_the_score_row_in_bfloat16(windows):
    family, sizes = "LlavaForConditionalGeneration", WINDOWS.get(windows, {})
    model, twin = (families.own_model(family, "mistral", a, **sizes).bfloat16() for a in ("sdpa", "eager"))
    given = collate(family, talks_of(family))
    given["pixel_values"] = given["pixel_values"].bfloat16()
    # Only the first layer: a near-tie may send the two implementations different ways after it.
    plain = twin(**given, output_attentions=True).attentions[LAYERS[0]]
    with tiny.watched() as steps, libra.attach(model, LIBRA):
        assert model(**given).logits.dtype == torch.bfloat16
    torch.testing.assert_close(steps[0].attention, asked(steps[0], plain), atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    "name, family, text, windows",
    [("libra", *one) for one in WINDOWED] + [(name, *WINDOWED[0]) for name in ("fastv", "turbo", "random")],
)
@torch.no_grad()
def test_windows_count_the_remaining_tokens(name, family, text, windows):
    """Prefill, cached decoding past the window, several samples: the computation by hand, whose windows
    do."""
    c = LIBRA if name == "libra" else Compression(method=name, layers=(1, 3))
    model, twin = (families.own_model(family, text, a, **WINDOWS[windows]) for a in ("sdpa", "eager"))
    talks = talks_of(family)
    plain = model(**collate(family, talks)).logits
    with libra.attach(model, c) as handle:
        logits = model(**collate(family, talks)).logits
        out = model.generate(
            **collate(family, talks),
            max_new_tokens=10,
            **SAID,
            return_dict_in_generate=True,
            output_logits=True,
        )
    assert handle.stats["cache"]["window"] > 0
    for b, t in enumerate(talks):
        hand = by_hand(twin, family, t, c, out.sequences[b, -10:-1].tolist()).logits
        torch.testing.assert_close(torch.stack(out.logits, 1)[b], hand[-10:], **CLOSE)
        torch.testing.assert_close(tiny.own(logits[b], len(hand) - 9, "left"), hand[:-9], **CLOSE)
    assert torch.equal(model(**collate(family, talks)).logits, plain)


# --- flash attention, with SDPA in its place ---


def switched(attention: str, family: str, text: str = "", **sizes):
    """A model of its own whose decoder attends in another way; its vision tower keeps what it has."""
    model = families.own_model(family, text, **sizes)
    model.model.language_model.config._attn_implementation = attention
    return model


@pytest.mark.parametrize(
    "name, family, text, windows",
    [("libra", family, families.KINDS[family].texts[0], None) for family in families.KINDS]
    + [("fastv", *one) for one in (WINDOWED[0], WINDOWED[2], WINDOWED[-1])],
)
@torch.no_grad()
def test_flash_attention_gives_what_sdpa_gives(flash_reference, name, family, text, windows):
    c = LIBRA if name == "libra" else Compression(method=name, layers=LAYERS)
    sizes = WINDOWS.get(windows, {})
    model, talks = families.own_model(family, text, **sizes), talks_of(family)
    flashing = switched("flash_attention_2", family, text, **sizes)
    options = dict(max_new_tokens=STEPS, **SAID, return_dict_in_generate=True, output_logits=True)
    for rows in (talks[:1], talks):
        for side in ("left", "right") if rows is talks else ("left",):
            given = collate(family, rows, side)
            with libra.attach(model, c) as one, libra.attach(flashing, c) as other:
                want = model(**given).logits
                flash_reference.asked.clear()
                got = flashing(**given).logits
                widths, calls = [len(t.ids) for t in rows], list(flash_reference.asked)
                assert other.stats["visual_tokens"] == one.stats["visual_tokens"]
                added = one.stats["compensation_tokens"]
                for layer, counts in enumerate(one.stats["visual_tokens"]):
                    lengths = [
                        width - first + count + sum(a[b] for a in added[:layer] if a)
                        for b, (width, first, count) in enumerate(
                            zip(widths, one.stats["visual_tokens"][0], counts)
                        )
                    ]
                    kind, told = calls[layer]
                    # Rows of one length are never taken for packed samples; padded ones are unpacked to their
                    # own lengths.
                    assert kind == ("whole" if len(set(lengths)) == 1 else "packed")
                    assert told["queries"] == told["keys"] == (lengths if kind == "packed" else lengths[0])
                assert len(calls) == 6
                for b, length in enumerate(lengths):
                    torch.testing.assert_close(
                        tiny.own(got[b], length, side), tiny.own(want[b], length, side), **CLOSE
                    )
                if side == "left":
                    said, again = model.generate(**given, **options), flashing.generate(**given, **options)
                    assert torch.equal(said.sequences, again.sequences)
                    torch.testing.assert_close(torch.stack(said.logits), torch.stack(again.logits), **CLOSE)
    assert flashing.model.language_model.config._attn_implementation == "flash_attention_2"


@every_family
@torch.no_grad()
def test_flash_attention_gets_no_position_ids_with_gaps(flash_reference, family):
    """Which it would take for several samples in one row; without compression it gets what the plain model
    gives."""
    model, t, seen = switched("flash_attention_2", family), talk(family, PATTERNS[0], 1), []
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((kwargs["position_ids"], kwargs["attention_mask"])),
            with_kwargs=True,
        )
        for layer in model.model.language_model.layers
    ]
    plain = model(**collate(family, [t])).logits
    untouched = list(seen)
    seen.clear()
    with libra.attach(model, LIBRA):
        model.generate(**collate(family, [t]), max_new_tokens=STEPS, **SAID)
    assert len(seen) == 6 * STEPS and all(given == (None, None) for given in seen)
    seen.clear()
    with libra.attach(model, Compression(method="vanilla")):
        assert torch.equal(model(**collate(family, [t])).logits, plain)
    for (one, _), (other, _) in zip(untouched, seen, strict=True):
        assert one is other is None or torch.equal(one, other)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(
    "family, text, windows",
    [(family, families.KINDS[family].texts[0], None) for family in families.KINDS] + [WINDOWED[2]],
)
@torch.no_grad()
def test_flex_attention_gives_what_sdpa_gives(family, text, windows):
    """Without its compiler, which takes half a minute on a CPU."""
    sizes, talks = WINDOWS.get(windows, {}), talks_of(family)
    model, flexing = (
        families.own_model(family, text, **sizes),
        switched("flex_attention", family, text, **sizes),
    )
    options = dict(max_new_tokens=STEPS, **SAID, return_dict_in_generate=True, output_logits=True)
    with (
        torch.compiler.set_stance("force_eager"),
        libra.attach(model, LIBRA),
        libra.attach(flexing, LIBRA) as handle,
    ):
        for rows in (talks[:1], talks):
            said, again = (m.generate(**collate(family, rows), **options) for m in (model, flexing))
            assert torch.equal(said.sequences, again.sequences)
            torch.testing.assert_close(torch.stack(said.logits), torch.stack(again.logits), **CLOSE)
            assert list(map(list, zip(*handle.stats["visual_tokens"]))) == [
                schedule(t.visual, LIBRA) for t in rows
            ]
