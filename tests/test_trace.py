"""The trace against a literal reading of what it says, and against the choice made again from its own
numbers."""

import families
import pytest
import tiny
import torch
from families import collate, talk

import libra
from libra import Compression
from libra.engine.trace import COMPENSATION, DROPPED, FATES, GONE, MERGED, TARGET, RowTrace

LAYERS = (1, 3)
CHOICES = {
    "libra": Compression(method="libra", layers=LAYERS, tau=0.6),
    "three stages": Compression(method="libra", layers=(1, 2, 4), ratio=2 / 3, tau=0.6),
    "fastv": Compression(method="fastv", layers=(2,), ratio=0.75),
    "turbo": Compression(method="turbo", layers=LAYERS),
    "everybody merges": Compression(select="topk", merge="igm-pos", layers=LAYERS),
    "nobody merges": Compression(select="random", merge="igm-neg", layers=LAYERS),
    "windowed": Compression(select="intervals", merge="drop", layers=LAYERS),
    "nothing removed": Compression(method="libra", layers=LAYERS, ratio=0.0),
}
FAMILY = "LlavaOnevisionForConditionalGeneration"
PATTERNS = ("t2 v t3 i t4", "t6", "t4 i t5", "i t1 i t2 v v t3")
every_choice = pytest.mark.parametrize("c", [pytest.param(c, id=name) for name, c in CHOICES.items()])
FATES_OF = {
    "drop": {DROPPED},
    "average": {MERGED},
    "igm": {MERGED, COMPENSATION},
    "igm-pos": {MERGED},
    "igm-neg": {COMPENSATION},
}


def talks_of(family: str) -> list[families.Talk]:
    return [talk(family, pattern, seed) for seed, pattern in enumerate(PATTERNS)]


def runs(visual: torch.Tensor) -> list[int]:
    return [len(run) for run in "".join("v" if v else " " for v in visual.tolist()).split()]


@torch.no_grad()
def traced(family: str, c: Compression, talks, side: str = "left") -> tuple[list[RowTrace], dict]:
    with libra.attach(families.model(family), c, trace=True) as handle:
        assert handle.trace is None
        families.model(family)(**collate(family, talks, side))
        return handle.trace, handle.stats


def read(row: RowTrace, c: Compression, visual: list[list[int]], compensated: list[int]) -> None:
    """Check one row's trace, sentence after sentence of its documentation."""
    owner = [span for span, length in enumerate(row.spans) for _ in range(length)]
    alive = set(range(len(owner)))
    assert [stage.layer for stage in row.stages] == list(c.layers)
    for number, stage in enumerate(row.stages):
        fates, slots, weights = stage.fate.tolist(), stage.slot.tolist(), stage.weight.tolist()
        assert len(fates) == len(slots) == len(weights) == len(stage.importance) == len(owner)
        targets = {t for t, fate in enumerate(fates) if fate == TARGET}
        assert {
            t for t, fate in enumerate(fates) if fate != GONE
        } == alive  # what is gone stays gone, nobody else goes
        assert row.kept(number) == sorted(targets) and len(targets) == visual[stage.layer + 1]
        assert {owner[t] for t in targets} == set(owner)  # no span is lost
        sums = dict.fromkeys([*targets, "compensation"], 0.0)
        for t, (fate, slot, weight) in enumerate(zip(fates, slots, weights)):
            assert 0 <= fate < len(FATES)
            if fate in (GONE, DROPPED):
                assert slot == -1 and weight == 0
            elif fate == COMPENSATION:
                assert slot == -1 and weight > 0
                sums["compensation"] += weight
            else:
                assert (
                    slot in targets
                    and owner[slot] == owner[t]
                    and weight > 0
                    and (slot == t) == (fate == TARGET)
                )
                sums[slot] += weight
        assert compensated[stage.layer] == (COMPENSATION in fates)
        assert sums.pop("compensation") == pytest.approx(float(COMPENSATION in fates), abs=1e-5)
        assert list(sums.values()) == pytest.approx([1.0] * len(targets), abs=1e-5)
        assert set(fates) - {GONE, TARGET} <= FATES_OF[c.merge]
        gone = torch.tensor([t not in alive for t in range(len(owner))], dtype=torch.bool)
        assert torch.equal(stage.importance.isnan(), gone) and (stage.importance[~gone] >= 0).all()
        alive = targets


def again(row: RowTrace, c: Compression) -> None:
    """The targets and the weights once more, from the trace's own importance: in Python, token by token."""
    alive = [list(range(sum(row.spans[:k]), sum(row.spans[: k + 1]))) for k in range(len(row.spans))]
    for number, stage in enumerate(row.stages):
        alpha = stage.importance.tolist()
        everyone = [t for span in alive for t in span]
        eta = sum(alpha[t] for t in everyone) / max(1, len(everyone))
        chosen = []
        for span in alive:
            n = len(span)
            keep = max(1, round((1 - c.ratio) * n))
            if c.select == "intervals":
                chosen.append(
                    [
                        max(span[i * n // keep : (i + 1) * n // keep], key=alpha.__getitem__)
                        for i in range(keep)
                    ]
                )
            elif c.select == "topk":
                chosen.append(sorted(sorted(span, key=lambda t: -alpha[t])[:keep]))
            else:
                chosen.append([t for t in span if stage.fate[t] == TARGET])
        assert row.kept(number) == [t for span in chosen for t in span]
        groups: dict[int, list[int]] = {}
        for t in everyone:
            if stage.fate[t] != DROPPED:
                groups.setdefault(int(stage.slot[t]), []).append(t)
            if c.merge == "igm" and stage.fate[t] != TARGET:
                assert (stage.fate[t] == MERGED) == (stage.similarity[t] > c.tau)
        for members in groups.values():
            pull = torch.tensor([0.0 if c.merge in ("drop", "average") else alpha[t] / eta for t in members])
            torch.testing.assert_close(stage.weight[members], pull.softmax(0), atol=1e-5, rtol=1e-4)
        alive = chosen


@every_choice
def test_a_trace_is_what_it_says(c):
    talks = talks_of(FAMILY)
    for side in ("left", "right"):
        rows, stats = traced(FAMILY, c, talks, side)
        assert [list(row.spans) for row in rows] == [runs(t.visual) for t in talks]
        for b, row in enumerate(rows):
            counts = [*(layer[b] for layer in stats["visual_tokens"]), stats["visual_tokens"][-1][b]]
            read(row, c, counts, [layer[b] if layer else 0 for layer in stats["compensation_tokens"]])
            again(row, c)
    assert rows[1].spans == () and all(len(stage.fate) == 0 for stage in rows[1].stages)
    if c.merge == "igm" and c.ratio:
        fates = torch.cat([stage.fate for row in rows for stage in row.stages]).tolist()
        assert {MERGED, COMPENSATION} <= set(fates)


@pytest.mark.parametrize("family", families.KINDS)
def test_every_familys_trace_is_what_it_says(family):
    c, talks = CHOICES["libra"], talks_of(family)[:3]
    rows, stats = traced(family, c, talks)
    for b, (row, t) in enumerate(zip(rows, talks)):
        assert list(row.spans) == runs(t.visual)
        read(
            row,
            c,
            [layer[b] for layer in stats["visual_tokens"]],
            [x[b] if x else 0 for x in stats["compensation_tokens"]],
        )
        again(row, c)


@every_choice
def test_rows_do_not_depend_on_each_other(c):
    talks = talks_of(FAMILY)
    together, _ = traced(FAMILY, c, talks)
    turned, _ = traced(FAMILY, c, talks[::-1], "right")
    for t, row, other in zip(talks, together, turned[::-1]):
        alone = [other]
        if t.visual.any():
            alone += traced(FAMILY, c, [t])[0]
        for single in alone:
            assert row.spans == single.spans
            for stage, same in zip(row.stages, single.stages, strict=True):
                assert torch.equal(stage.fate, same.fate) and torch.equal(stage.slot, same.slot)
                torch.testing.assert_close(stage.weight, same.weight, atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(
                    stage.importance, same.importance, atol=1e-5, rtol=1e-3, equal_nan=True
                )


@torch.no_grad()
def test_the_last_prefill_with_visual_tokens_is_told():
    """Decoding steps and prompts of text leave it alone; without ``trace`` there is none; it can be read
    after the block."""
    model, talks = families.model(FAMILY), talks_of(FAMILY)
    with libra.attach(model, CHOICES["libra"], trace=True) as handle:
        model(**collate(FAMILY, talks[1:2]))
        assert handle.trace is None
        model(**collate(FAMILY, talks[2:3]))
        first = handle.trace
        model.generate(**collate(FAMILY, talks[2:3]), max_new_tokens=3, do_sample=False)
        model(**collate(FAMILY, talks[1:2]))
        assert [row.kept(1) for row in handle.trace] == [row.kept(1) for row in first]
        model.generate(**collate(FAMILY, talks[:2]), max_new_tokens=2, do_sample=False, num_beams=2)
    assert [row.spans for row in handle.trace] == [
        tuple(runs(t.visual)) for t in (talks[0], talks[0], talks[1], talks[1])
    ]
    with libra.attach(model, CHOICES["libra"]) as handle:
        model(**collate(FAMILY, talks))
    assert handle.trace is None and handle.stats is not None


@every_choice
@torch.no_grad()
def test_llavas_own_model_tells_the_same(c):
    """``set_compression(…, trace=True)`` on the same embeddings."""
    family = "LlavaForConditionalGeneration"
    model, talks = families.model(family), talks_of(family)
    ours = tiny.llava_model()
    ours.model.load_state_dict(model.model.language_model.state_dict())
    given = collate(family, talks)
    told = families.decoder_arguments(model, given)
    visual, mask = given["input_ids"] == families.IMAGE, given["attention_mask"]
    keys = torch.tensor([families.sample_key(t.ids, t.visual) for t in talks])
    ours.set_compression(c, trace=True)
    assert ours.compression_trace is None
    ours(inputs_embeds=told["inputs_embeds"], attention_mask=mask, visual_mask=visual, row_seeds=keys)
    rows, _ = traced(family, c, talks)
    for row, other in zip(rows, ours.compression_trace, strict=True):
        assert row.spans == other.spans
        for stage, same in zip(row.stages, other.stages, strict=True):
            assert stage.layer == same.layer
            assert torch.equal(stage.fate, same.fate) and torch.equal(stage.slot, same.slot)
            torch.testing.assert_close(stage.weight, same.weight, atol=1e-4, rtol=1e-4)
    ours.set_compression(c)
    ours(inputs_embeds=told["inputs_embeds"], attention_mask=mask, visual_mask=visual, row_seeds=keys)
    assert ours.compression_trace is None
