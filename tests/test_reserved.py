"""``compensation: reserved``: every length is known before anything runs."""

import families
import pytest
import tiny
import torch
import zoo

import libra
from libra import Compression
from libra.budget import model_flops
from libra.flops import cost
from libra.methods import MERGERS
from libra.rows import spec_of

LLAVA = "LlavaForConditionalGeneration"


def chat(pattern: str, seed: int) -> families.Talk:
    return zoo.talk(LLAVA, pattern, seed)


@pytest.mark.parametrize("keys", [
    dict(method="libra", layers=(1, 3)),
    dict(method="libra", layers=(0, 2, 4), ratio=(0.5, 0.0, 0.9), tau=-1.0),
    dict(method="libra-input", keep=5),
    dict(steps=[dict(method="libra-input", keep=6, compensation="reserved"), dict(method="libra", at=2)]),
], ids=["layers", "nothing would compensate", "input", "one step of two"])  # fmt: skip
@torch.no_grad()
def test_the_count_is_that_of_libra_flops_whatever_the_picture(keys):
    c = Compression(**keys, **({} if "steps" in keys else {"compensation": "reserved"}))
    model = zoo.model(LLAVA)
    spec = spec_of(model.config.get_text_config(), "tiny")
    for seed in range(4):
        given = zoo.collate(LLAVA, [chat("t4 i t5", seed)])
        with libra.attach(model, c) as handle:
            logits = model(**given).logits
        stats = handle.stats
        visual = stats["given"][0]
        promised = cost(spec, handle.compression, [visual], whole=True)
        assert stats["flops"] == [promised.total]
        if not c.reserves:
            continue  # the other step's compensation tokens are not counted
        text = given["input_ids"].shape[1] - visual
        last = [step.layer for step in c.schedule(spec.layers)][-1] + 1
        assert stats["columns"] == [text + promised.tokens[last]] == [logits.shape[1]]


@torch.no_grad()
def test_at_the_input_one_more_than_is_kept():
    """What an engine that asks for the length beforehand is told; a picture that is kept whole gets none."""
    model, given = zoo.model(LLAVA), zoo.collate(LLAVA, [chat("t2 i t3 i t4", 7), chat("t9", 8)])
    whole = int((given["input_ids"][0] == model.config.image_token_id).sum())
    for keep, extra in ((1, 1), (7, 1), (whole // 2, 0), (1000, 0)):
        c = Compression(method="libra-input", keep=keep, compensation="reserved")
        with libra.attach(model, c) as handle:
            model(**given)
        assert handle.stats["visual_tokens"][0] == [2 * min(keep, whole // 2), 0]
        assert handle.stats["compensation_at_input"] == [extra, 0]
        spec = spec_of(model.config.get_text_config(), "tiny")
        tokens = 2 * min(keep, whole // 2) + extra
        assert handle.stats["flops"][0] == model_flops(spec, [tokens] * spec.layers)


def test_a_merge_of_ones_own_has_its_least_similar_token_there(monkeypatch):
    """It may leave the slot empty: the token goes there by itself."""

    def mean(matches, c):
        return matches.nearest[1], matches.pull

    monkeypatch.setitem(MERGERS, "mine", None)
    monkeypatch.delitem(MERGERS, "mine")
    libra.register_merge("mine")(mean)
    draw = torch.Generator().manual_seed(0)
    hidden, importance = torch.randn(2, 12, 8, generator=draw), torch.rand(2, 12, generator=draw)
    c = Compression(merge="mine", compensation="reserved")
    out = libra.compress(hidden, importance, c, lengths=[12, 1])
    assert out.compensated == [True, False]
    (alone,) = (out.groups[0] == 6).nonzero().flatten().tolist()
    assert out.similarity[0, alone] == out.similarity[0].min()
    torch.testing.assert_close(out.tokens[0, 6], hidden[0, alone])
    assert not libra.compress(hidden, importance, Compression(merge="mine")).compensated[0]


@torch.no_grad()
def test_it_is_igm_but_for_the_least_similar_token():
    """Where some token is too dissimilar anyway, nothing changes."""
    row = tiny.row("t3 v16 t5", 1)
    model, said = tiny.llava_model(), []
    for compensation in ("ragged", "reserved"):
        c = Compression(method="libra", layers=(1, 3), tau=0.99, compensation=compensation)
        model.set_compression(c)
        said.append(model(**tiny.alone(row)).logits)
    assert torch.equal(*said)
