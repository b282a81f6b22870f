"""The places `input` and `tower` next to what people do with a model: flash attention, torch.compile,
adapters, threads, training with labels; for the loss through both doors."""

from concurrent.futures import ThreadPoolExecutor

import families
import peft
import pytest
import tiny
import torch
from families import SAID, collate, talk

import libra
from libra import Compression
from libra.rows import EMBEDDED
from llava.model.builder import load_pretrained_model

CLOSE = dict(atol=1e-4, rtol=1e-4)
LLAVA, TILES, WINDOWS = (
    f"{name}ForConditionalGeneration" for name in ("Llava", "LlavaOnevision", "Qwen2_5_VL")
)
CASES = [
    (LLAVA, "visionzip", "tower"),
    (LLAVA, "cdpruner", "input"),
    (LLAVA, "downsample", "tower"),
    (TILES, "hiprune", "input"),
    (TILES, "visionzip", "tower"),
    (WINDOWS, "fastervlm", "input"),
]
FAST = (CASES[0], CASES[3])


def marked(chosen) -> list:
    return [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in chosen]


cases = pytest.mark.parametrize("family, method, at", marked(CASES))


def early(method: str, at: str, **keys) -> Compression:
    return Compression(method=method, at=at, **{"ratio": 0.5, **keys})


def talks_of(family: str) -> list[families.Talk]:
    return [talk(family, pattern, seed) for seed, pattern in enumerate(("t4 i t5", "t2 i t3", "t6"))]


@pytest.mark.parametrize(
    "family, method, at, positions",
    [pytest.param(*case.values, "original", marks=case.marks) for case in marked(CASES)]
    + [(*case, "compact") for case in CASES[2:3]],
)
@torch.no_grad()
def test_flash_attention_gives_what_sdpa_gives(flash_reference, family, method, at, positions):
    """Rows of one length go whole, without position ids, which have gaps; padded ones at their lengths."""
    model, flashing = families.own_model(family), families.own_model(family)
    flashing.model.language_model.config._attn_implementation = "flash_attention_2"
    seen = []
    for layer in flashing.model.language_model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs.get("position_ids")), with_kwargs=True
        )
    c = early(method, at, positions=positions)
    options = dict(max_new_tokens=3, **SAID, return_dict_in_generate=True, output_logits=True)
    for rows in (talks_of(family)[:1], talks_of(family)):
        given = collate(family, rows)
        with libra.attach(model, c) as one, libra.attach(flashing, c) as other:
            want = model(**given).logits
            flash_reference.asked.clear()
            seen.clear()
            got = flashing(**given).logits
            lengths = one.stats["columns"]
            assert other.stats["visual_tokens"] == one.stats["visual_tokens"]
            kind = "whole" if len(rows) == 1 else "packed"
            expected = lengths if kind == "packed" else lengths[0]
            assert flash_reference.asked == [(kind, {"queries": expected, "keys": expected})] * 6
            assert seen == [None] * 6
            for b, length in enumerate(lengths):
                torch.testing.assert_close(
                    tiny.own(got[b], length, "left"), tiny.own(want[b], length, "left"), **CLOSE
                )
            said, again = model.generate(**given, **options), flashing.generate(**given, **options)
            torch.testing.assert_close(torch.stack(said.logits), torch.stack(again.logits), **CLOSE)


COMPILED = [
    (*case, what, when)
    for what, when in (("layers", "before"), ("layers", "while attached"), ("model", "while attached"))
    for case in FAST
]


@pytest.mark.parametrize(
    "family, method, at, what, when",
    [COMPILED[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in COMPILED[1:])],
)
@torch.no_grad()
def test_compiled(family, method, at, what, when):
    """The tower is compiled with the rest where the whole model is; its marks go on telling."""
    torch._dynamo.reset()
    model, given = families.own_model(family, num_hidden_layers=2), collate(family, talks_of(family)[:1])

    def ask():
        return model(**given).logits, model.generate(**given, max_new_tokens=2, **SAID)

    def compile_it():
        for module in [model] if what == "model" else model.model.language_model.layers:
            module.compile(backend="eager")

    plain = ask()
    with libra.attach(model, early(method, at)):
        short = ask()
    if when == "before":
        compile_it()
    with libra.attach(model, early(method, at)) as handle:
        if when != "before":
            compile_it()
        for value, wanted in zip(ask(), short, strict=True):
            torch.testing.assert_close(value, wanted, **CLOSE)
        assert handle.stats["visual_tokens"][0][0] < int(talks_of(family)[0].visual.sum())
    for value, wanted in zip(ask(), plain, strict=True):
        torch.testing.assert_close(value, wanted, **CLOSE)
    torch._dynamo.reset()


@cases
def test_adapters_in_the_decoder_and_in_the_tower(family, method, at):
    """LoRA starts as the model itself, and a training step lowers the loss."""
    model, c = families.own_model(family), early(method, at)
    given, answered = collate(family, talks_of(family)), with_answers(family)
    with torch.no_grad(), libra.attach(model, c):
        logits, loss = model(**given).logits, model(**answered).loss
    names = ["q_proj", "v_proj", "qkv"] if family == WINDOWS else ["q_proj", "v_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names))
    with libra.attach(adapted, c):
        with torch.no_grad():
            torch.testing.assert_close(adapted(**given).logits, logits, **CLOSE)
            adapted.generate(**given, max_new_tokens=2, **SAID)
        optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
        for _ in range(2):
            optimizer.zero_grad()
            trained = adapted(**answered).loss
            trained.backward()
            optimizer.step()
        assert trained < loss


@pytest.mark.parametrize("family, method, at", marked(case for case in CASES if case[0] != WINDOWS))
@torch.no_grad()
def test_threads_on_one_model(family, method, at):
    """Other batches at the same time, and a loss, each as by itself. (Qwen's models remember the last
    prefill's positions themselves.)"""
    model, rows = families.model(family), talks_of(family)
    batches = [collate(family, part) for part in (rows, rows[1:], rows[:1])]
    answered = with_answers(family)
    with libra.attach(model, early(method, at)):
        want = [model.generate(**given, max_new_tokens=3, **SAID) for given in batches]
        loss = model(**answered).loss

        def generate(given):
            with torch.no_grad():
                return [model.generate(**given, max_new_tokens=3, **SAID) for _ in range(4)]

        def lose(_):
            with torch.no_grad():
                return [model(**answered).loss for _ in range(6)]

        with ThreadPoolExecutor(4) as pool:
            said = [pool.submit(generate, given) for given in batches]
            losses = pool.submit(lose, None).result()
    for one, wanted in zip(said, want, strict=True):
        assert all(torch.equal(ids, wanted) for ids in one.result())
    torch.testing.assert_close(torch.stack(losses), loss.expand(6), **CLOSE)


# --- training ---


def with_answers(family: str) -> dict[str, torch.Tensor]:
    talks = [talk(family, "t3 i t3 a4", 3), talk(family, "t2 i t3 a2", 4)]
    return collate(family, talks, "right", labels=True)


def loss_by_hand(logits, labels, trace, visual) -> torch.Tensor:
    """Mean cross-entropy of the labels at the columns that a trace says were left."""
    found = []
    for b, row in enumerate(trace):
        columns, kept = visual[b].nonzero().flatten(), torch.ones(len(visual[b]), dtype=torch.bool)
        kept[columns] = False
        kept[columns[row.kept(len(row.stages) - 1)]] = True
        own = labels[b][kept]
        said = logits[b][: len(own)]
        found.append(
            torch.nn.functional.cross_entropy(said[:-1], own[1:], reduction="none", ignore_index=-100)
        )
    supervised = torch.cat(found)
    return supervised.sum() / sum(int((row[1:] != -100).sum()) for row in labels)


@cases
def test_the_loss_is_that_of_the_columns_that_are_left(family, method, at):
    """And with checkpointed layers the same, gradients too."""
    model, given = families.own_model(family), with_answers(family)
    labels = given["labels"]
    visual = (given["input_ids"] == families.IMAGE) & given["attention_mask"].bool()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        with libra.attach(model, early(method, at), trace=True) as handle:
            model.zero_grad()
            output = model(**given, use_cache=False)
            output.loss.backward()
            trace = handle.trace
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((output.loss.detach(), gradients))
        wanted = loss_by_hand(output.logits.detach(), labels, trace, visual)
        torch.testing.assert_close(output.loss.detach(), wanted, **CLOSE)
    (loss, gradients), (again, same) = found
    torch.testing.assert_close(again, loss, **CLOSE)
    assert any("projector" in name or "merger" in name for name in gradients)
    for name, gradient in gradients.items():
        assert gradient.isfinite().all()
        torch.testing.assert_close(same[name], gradient, **CLOSE)


@pytest.mark.parametrize("method, at", [case[1:] for case in CASES if case[0] == LLAVA])
def test_llava_s_own_loss_is_that_of_the_columns_that_are_left(method, at):
    _, model, _, _ = load_pretrained_model(str(EMBEDDED), None, "mini", device="cpu")
    draw = torch.Generator().manual_seed(7)
    ids = torch.randint(5, 70, (2, 9), generator=draw)
    ids[0, 2] = ids[1, 3] = -200
    labels = ids.clone()
    labels[:, :6] = -100
    pixels = torch.randn(2, 3, 96, 96, generator=draw)
    model.set_compression(early(method, at), trace=True)
    output = model(ids, labels=labels, images=pixels)
    output.loss.backward()
    spliced = model.splice(ids, labels=labels, images=pixels)
    wanted = loss_by_hand(output.logits.detach(), spliced.labels, model.compression_trace, spliced.visual)
    torch.testing.assert_close(output.loss.detach(), wanted, **CLOSE)
    gradients = [p.grad for p in model.get_model().mm_projector.parameters()]
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in gradients)
