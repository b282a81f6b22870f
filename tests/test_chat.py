"""Conversations on one cache: ``generate(cache=…)`` and ``llava.serve.session`` on the embedded model."""

from pathlib import Path
from types import SimpleNamespace

import plain
import pytest
import torch
from PIL import Image
from transformers import DynamicCache

from libra import Compression
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.serve.session import Session

MINI = Path(__file__).parents[1] / "mini/checkpoint"
NEXT = Path(__file__).parent / "golden/llava_next_llama3/checkpoint"
CLOSE = dict(atol=1e-4, rtol=1e-4)
CHOICES = {
    "libra": Compression(method="libra", layers=(2, 5, 8)),
    "fastv": Compression(method="fastv", layers=(1,), ratio=0.75),
    "pyramiddrop": Compression(method="pyramiddrop", layers=(2, 5)),
    "vanilla": None,
}
every_choice = pytest.mark.parametrize("name", CHOICES)


@pytest.fixture
def model(loaded):
    yield loaded[1]
    loaded[1].set_compression(None)


def picture(seed: int) -> Image.Image:
    """Coloured squares on a noisy ground."""
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 60, (96, 96, 3), generator=draw)
    for _ in range(4):
        y, x = torch.randint(0, 72, (2,), generator=draw).tolist()
        pixels[y : y + 20, x : x + 20] = torch.randint(80, 256, (3,), generator=draw)
    return Image.fromarray(pixels.to(torch.uint8).numpy())


class Turn:
    """A turn's token ids (with <s>, which matters to nobody here) and images, and what the model made of
    them."""

    def __init__(self, loaded, text: str, *images: Image.Image):
        tokenizer, model, processor, _ = loaded
        self.ids = tokenizer_image_token(text, tokenizer, return_tensors="pt")[None]
        self.pixels = process_images(list(images), processor, model.config) if images else None

    def ask(self, model, cache, tokens: int = 4) -> None:
        out = model.generate(
            self.ids,
            images=self.pixels,
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=tokens,
            pad_token_id=0,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        self.answer, self.logits = out.sequences[0], torch.stack(out.logits, 1)[0]


@torch.no_grad()
def replayed(model, turns: list[Turn]) -> list[torch.Tensor]:
    """The logits of each turn's answer by one cache-free pass by hand; a turn's images are scored by its own
    end."""
    embed, parts, prefills, spans, start = model.get_input_embeddings(), [], [], [], 0
    c = model.compression or Compression(method="vanilla")
    for turn in turns:
        if turn.pixels is None:
            embeds, visual = embed(turn.ids)[0], torch.zeros(turn.ids.shape[1], dtype=torch.bool)
        else:
            spliced = model.splice(turn.ids, images=turn.pixels)
            embeds, visual = spliced.embeds[0], spliced.visual[0]
        last = start + len(embeds) - 1
        prefills.append(plain.Prefill.of(visual, last, c, start))
        said = turn.answer[:-1]  # the last token was not fed
        parts += [embeds, embed(said)]
        spans.append(range(last, last + len(said) + 1))
        start = last + len(said) + 1
    want = plain.decode(model.model, model.lm_head, torch.cat(parts), c, prefills)
    return [want.logits[[want.source.index(column) for column in columns]] for columns in spans]


@every_choice
@torch.no_grad()
def test_a_later_turn_appends_and_keeps_what_was_chosen(loaded, model, name):
    """Three turns (an image, two more images, text alone) are one pass that replays each turn's choice."""
    model.set_compression(CHOICES[name])
    cache, lengths = DynamicCache(), []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    turns = [
        Turn(loaded, "USER: <image>\nwhat digit is at the top left ? ASSISTANT:", picture(0)),
        Turn(
            loaded, "USER: <image>\n<image>\nhow many digits are there ? ASSISTANT:", picture(1), picture(2)
        ),
        Turn(loaded, "USER: and in the bottom row ? ASSISTANT:"),
    ]
    try:
        for turn in turns:
            turn.ask(model, cache)
    finally:
        model.model.layers[0]._forward_pre_hooks.clear()
    assert [n for n in lengths if n > 1] == [
        len(turn.ids[0]) + 255 * (turn.ids < 0).sum().item() for turn in turns
    ]
    for turn, want in zip(turns, replayed(model, turns), strict=True):
        torch.testing.assert_close(turn.logits, want, **CLOSE)
        assert turn.answer.tolist() == want.argmax(-1).tolist()


@pytest.mark.parametrize("name", ["libra", "vanilla"])
@torch.no_grad()
def test_images_may_come_after_text(loaded, model, name):
    model.set_compression(CHOICES[name])
    cache = DynamicCache()
    turns = [
        Turn(loaded, "USER: read the digits . ASSISTANT:"),
        Turn(loaded, "USER: <image>\nhow many are there ? ASSISTANT:", picture(0)),
    ]
    for turn in turns:
        turn.ask(model, cache)
    for turn, want in zip(turns, replayed(model, turns), strict=True):
        torch.testing.assert_close(turn.logits, want, **CLOSE)
    padded = torch.nn.functional.pad(turns[0].ids, (2, 0))
    cache = DynamicCache()
    turns[1].ask(model, cache)
    got = model.generate(
        padded, attention_mask=(padded > 0).long(), cache=cache, do_sample=False, max_new_tokens=3
    )
    cache = DynamicCache()
    turns[1].ask(model, cache)
    assert torch.equal(got, model.generate(turns[0].ids, cache=cache, do_sample=False, max_new_tokens=3))


def test_what_a_later_turn_cannot_be(loaded, model):
    turn, cache = Turn(loaded, "USER: <image>\nwhat digit is it ? ASSISTANT:", picture(0)), DynamicCache()
    turn.ask(model, cache)
    for wrong, message in (
        (dict(inputs=turn.ids.repeat(2, 1)), "this call has 2 rows"),
        (dict(inputs=turn.ids, num_beams=2), "this call has num_beams above 1"),
        (
            dict(inputs=turn.ids, num_return_sequences=2, do_sample=True),
            "this call has num_return_sequences above 1",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(**wrong, past_key_values=cache)
    model.set_compression(CHOICES["libra"])
    with pytest.raises(ValueError, match="no image to compress"):
        model.generate(turn.ids[:, :1])


def test_visual_tokens_are_counted_as_the_model_makes_them(loaded, model):
    processor = loaded[2]
    pixels = process_images([picture(0), picture(1)], processor, model.config)
    assert model.visual_tokens(pixels) == [256, 256]
    tokenizer, other, processor, _ = load_pretrained_model(str(NEXT), None, "llava-llama3", device="cpu")
    images = [Image.new("RGB", size, "red") for size in ((100, 60), (40, 100), (64, 64))]
    tiles, sizes = process_images(images, processor, other.config), [image.size for image in images]
    counts = other.visual_tokens(tiles, sizes)
    assert counts == [len(tokens) for tokens in other.image_features(tiles, sizes)] and len(set(counts)) > 1


# --- sessions ---


def session(loaded, *images, **options) -> Session:
    return Session(*loaded, "mini", list(images), **options)


def by_hand(loaded, prompt: str, *images, tokens: int = 8) -> str:
    """The answer to a whole prompt, by the model alone."""
    tokenizer, model, processor, _ = loaded
    ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None]
    pixels = process_images(list(images), processor, model.config)
    new = model.generate(ids, images=pixels, do_sample=False, max_new_tokens=tokens, pad_token_id=0)
    return tokenizer.decode(new[0], skip_special_tokens=True).strip()


@pytest.fixture
def calls(model, monkeypatch):
    """What each call of ``generate`` was given: the number of ids, and of images."""
    seen, generate = [], model.generate

    def spy(ids, images=None, **kwargs):
        seen.append((ids.shape[1], 0 if images is None else len(images)))
        return generate(ids, images=images, **kwargs)

    monkeypatch.setattr(model, "generate", spy)
    return seen


@every_choice
def test_a_session_runs_the_new_turn_alone(loaded, model, calls, name):
    model.set_compression(CHOICES[name])
    chat = session(loaded, picture(0))
    first = chat.ask("what digit is at the top left ?", max_new_tokens=8)
    second = chat.ask("how many digits are there ?", max_new_tokens=8)
    chat.show(picture(1))
    third = chat.ask("what color is the digit ?", max_new_tokens=8)
    assert not (first.reread or second.reread or third.reread)
    # <s> of the first turn; </s> and "USER :" … "ASSISTANT :" of the others.
    assert calls == [(1 + 2 + 1 + 8 + 2, 1), (1 + 2 + 6 + 2, 0), (1 + 2 + 1 + 6 + 2, 1)]
    assert [message for _, message in chat.conversation.messages[1::2]] == [
        first.text,
        second.text,
        third.text,
    ]
    assert 0 < third.first_token <= third.seconds
    counts = chat.visual_tokens
    assert counts[0] == 512 and counts == [2 * n for n in _counts_of_one(loaded, model)]
    if name == "vanilla":  # nothing was chosen: the cached conversation is the whole prompt's
        prompt = chat.conversation.get_prompt().removesuffix(f" {third.text}</s>")
        assert third.text == by_hand(loaded, prompt, picture(0), picture(1))


def _counts_of_one(loaded, model) -> list[int]:
    chat = session(loaded, picture(0))
    chat.ask("what digit ?", max_new_tokens=1)
    return chat.visual_tokens


@torch.no_grad()
def test_an_answer_that_is_written_otherwise_is_taken_out_of_the_cache(loaded, model, calls):
    """The prompt has another text than the cached one from the first answer on; the compressed image
    stays."""
    model.set_compression(CHOICES["libra"])
    chat = session(loaded, picture(0))
    chat.ask("what digit is at the top left ?", max_new_tokens=8)
    chat.conversation.messages[1][1] = "red red"
    second = chat.ask("how many digits are there ?", max_new_tokens=8)
    assert not second.reread and calls[1] == (2 + 1 + 2 + 6 + 2, 0)
    turns = [
        Turn(loaded, "USER: <image>\nwhat digit is at the top left ? ASSISTANT:", picture(0)),
        Turn(loaded, " red red</s>USER: how many digits are there ? ASSISTANT:"),
    ]
    turns[1].ids = turns[1].ids[:, 1:]  # no <s> in the middle
    cache = DynamicCache()
    turns[0].ask(model, cache, tokens=1)
    turns[1].ask(model, cache, tokens=8)
    want = loaded[0].decode(
        turns[1].answer[: (turns[1].answer == loaded[0].eos_token_id).int().argmax()],
        skip_special_tokens=True,
    )
    assert second.text == want


@pytest.mark.parametrize("name", ["libra", "vanilla"])
def test_a_prompt_that_differs_before_its_image_is_read_again(loaded, model, calls, name):
    model.set_compression(CHOICES[name])
    chat = session(loaded, picture(0))
    chat.ask("what digit is at the top left ?", max_new_tokens=8)
    chat.conversation.messages[0][1] = "color : <image>\nwhat color is it ?"
    second = chat.ask("how many digits are there ?", max_new_tokens=8)
    prompt = chat.conversation.get_prompt().removesuffix(f" {second.text}</s>")
    assert second.text == by_hand(loaded, prompt, picture(0))
    assert second.reread and calls[1][1] == 1
    assert chat.visual_tokens == _counts_of_one(loaded, model)


def test_reprefill_lets_compression_follow_the_newest_question(loaded, model, calls):
    model.set_compression(CHOICES["libra"])
    chat = session(loaded, picture(0), reprefill=True)
    chat.ask("what digit is at the top left ?", max_new_tokens=8)
    second = chat.ask("how many digits are there ?", max_new_tokens=8)
    prompt = chat.conversation.get_prompt().removesuffix(f" {second.text}</s>")
    assert second.text == by_hand(loaded, prompt, picture(0)) and not second.reread
    assert [images for _, images in calls[:2]] == [1, 1]


def test_errors_keep_the_conversation(loaded, model, monkeypatch, tmp_path):
    model.set_compression(CHOICES["libra"])
    chat, other = session(loaded, picture(0)), session(loaded, picture(0))
    for one in (chat, other):
        one.ask("what digit is at the top left ?", max_new_tokens=8)
    before = chat.conversation.messages
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match="broken.png"):
        chat.show(tmp_path / "broken.png")
    with pytest.raises(ValueError, match="videos are for VideoLLaMA-2"):
        chat.show(tmp_path, "video")
    with pytest.raises(ValueError, match="images to show: none, places for them in the question: <image>"):
        chat.ask("where is the <image> ?")
    with pytest.raises(
        ValueError, match=r"the conversation has 10\d\d tokens and the model takes 1024; start a new one"
    ):
        chat.ask("digit " * 750)
    assert chat.conversation.messages == before and len(chat.pictures) == 1
    assert chat.ask("how many ?", max_new_tokens=8).text == other.ask("how many ?", max_new_tokens=8).text

    before = chat.conversation.messages
    with monkeypatch.context() as patch:
        patch.setattr(
            model, "generate", lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("out of memory"))
        )
        with pytest.raises(RuntimeError):
            chat.ask("what else ?")
    assert chat.conversation.messages == before
    assert chat.ask("what else ?", max_new_tokens=8).reread  # the cache may have held a part of the turn
    chat.restart()
    assert chat.conversation.messages == [] and chat.pictures == [] and chat.visual_tokens == []


def test_the_length_counts_every_visual_token(loaded, model):
    """Four images of 256 tokens do not fit; three do."""
    chat = session(loaded, *[picture(seed) for seed in range(4)])
    with pytest.raises(ValueError, match=r"the conversation has 10\d\d tokens and the model takes 1024"):
        chat.ask("how many ?")
    chat.restart()
    for seed in range(3):
        chat.show(picture(seed))
    assert chat.ask("how many ?", max_new_tokens=2).text is not None and chat.visual_tokens == [768] * 12


def test_marks_around_an_image(loaded, model, monkeypatch):
    """As checkpoints with ``mm_use_im_start_end`` were trained."""
    monkeypatch.setattr(model.config, "mm_use_im_start_end", True)
    chat = session(loaded, picture(0), picture(1))
    chat.ask("<image-placeholder> or <image-placeholder> ?", max_new_tokens=1)
    chat.show(picture(0))
    chat.ask("and this ?", max_new_tokens=1)
    questions = [text for _, text in chat.conversation.messages[::2]]
    assert questions == [
        "<im_start><image><im_end> or <im_start><image><im_end> ?",
        "<im_start><image><im_end>\nand this ?",
    ]


def test_a_mark_in_an_answer_is_no_image_later(loaded, model, monkeypatch):
    chat = session(loaded, picture(0))
    chat.ask("what digit ?", max_new_tokens=2)
    words = SimpleNamespace(decode=lambda *args, **kwargs: " an <image> of 3 ")
    with monkeypatch.context() as patch:
        patch.setattr(chat.tokenizer, "decode", words.decode)
        assert chat.ask("how many ?", max_new_tokens=2).text == "an <image> of 3"
    assert chat.conversation.messages[-1][1] == "an < image> of 3"
    assert chat.ask("and now ?", max_new_tokens=2) is not None
