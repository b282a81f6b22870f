"""How relevant visual tokens are for the question, by the vision tower's own CLIP: against CLIP read by hand,
through both doors."""

import copy

import pytest
import tiny
import torch
from transformers import AutoTokenizer, CLIPModel

import libra
from libra import ClipRelevance, Compression, Context, compress
from libra.engine.relevance import Asked
from libra.mini.huggingface import load, question, relevance
from libra.rows import EMBEDDED
from llava.model.builder import load_pretrained_model

TOWER = EMBEDDED / "vision_tower"
CLOSE = dict(atol=2e-5, rtol=1e-4)
WORDS = "what digit is red ?"


@pytest.fixture(scope="module")
def llava():
    tokenizer, model, _, _ = load_pretrained_model(str(EMBEDDED), None, "mini", device="cpu")
    return tokenizer, model


@pytest.fixture(scope="module")
def stock():
    model, processor = load()
    return model, processor, relevance(processor)


def ids_of(tokenizer, text: str) -> list[int]:
    before, after = text.split("<image>")
    return [*tokenizer(before).input_ids, -200, *tokenizer(after, add_special_tokens=False).input_ids]


@torch.no_grad()
def by_hand(pixels: torch.Tensor, pieces: list[str]) -> torch.Tensor:
    """(N,): mean over the pieces of a question of the cosine of each patch's embedding with theirs."""
    clip = CLIPModel.from_pretrained(TOWER, dtype=torch.float32)
    read = AutoTokenizer.from_pretrained(TOWER)
    states = clip.vision_model(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
    seen = clip.visual_projection(clip.vision_model.post_layernorm(states))
    found = []
    for piece in pieces:
        ids = [read.bos_token_id, *read(piece, add_special_tokens=False).input_ids, read.eos_token_id]
        text = clip.text_model(input_ids=torch.tensor([ids])).pooler_output
        found.append(torch.cosine_similarity(seen, clip.text_projection(text)))
    return torch.stack(found).mean(0)


@torch.no_grad()
def seen_by(model, ids, pixels) -> Context:
    return model.splice(torch.tensor([ids]), images=pixels).seen.context


@torch.no_grad()
def test_llava_s_door_compares_with_the_question_as_by_hand(llava):
    tokenizer, model = llava
    pixels = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    model.set_compression("cdpruner", keep=28)
    try:
        ids = ids_of(tokenizer, f"USER : <image> {WORDS} ASSISTANT :")
        context = seen_by(model, ids, pixels[:1])
        torch.testing.assert_close(context.relevance[0], by_hand(pixels[:1], [WORDS]), **CLOSE)
        # Longer than the text tower reads at once: 27 words and the rest.
        longer = (WORDS.removesuffix(" ?") + " ") * 7
        words = longer.split()
        context = seen_by(model, ids_of(tokenizer, f"USER : <image> {longer} ASSISTANT :"), pixels[:1])
        wanted = by_hand(pixels[:1], [" ".join(words[:27]), " ".join(words[27:])])
        assert len(words) == 28
        torch.testing.assert_close(context.relevance[0], wanted, **CLOSE)
        before = seen_by(model, ids_of(tokenizer, f"{WORDS} <image> ASSISTANT :"), pixels[:1])
        torch.testing.assert_close(before.relevance[0], by_hand(pixels[:1], [WORDS]), **CLOSE)
        # What is kept is what the maths keeps that is given this relevance.
        model.set_compression("cdpruner", keep=28, trace=True)
        model(torch.tensor([ids]), images=pixels[:1])
        embeds = model.encode_images(pixels[:1])
        hand = Context(relevance=by_hand(pixels[:1], [WORDS])[None])
        out = compress(embeds, None, Compression(method="cdpruner", keep=28), context=hand)
        assert model.compression_trace[0].kept(0) == out.targets[0].tolist()
    finally:
        model.set_compression(None)


@torch.no_grad()
def test_an_answer_is_no_part_of_the_question(llava):
    tokenizer, model = llava
    pixels = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(2))
    model.set_compression("cdpruner", keep=28)
    ids = torch.tensor([ids_of(tokenizer, f"USER : <image> {WORDS} ASSISTANT : seven")])
    labels = torch.full_like(ids, -100)
    labels[0, -1] = ids[0, -1]
    context = model.splice(ids, labels=labels, images=pixels).seen.context
    model.set_compression(None)
    torch.testing.assert_close(context.relevance[0], by_hand(pixels, [WORDS]), **CLOSE)


@torch.no_grad()
def test_an_attached_model_keeps_the_same_tokens_with_clip(llava, stock):
    tokenizer, ours = llava
    theirs, processor, clip = stock
    draw = torch.Generator().manual_seed(3)
    from PIL import Image

    picture = Image.fromarray(torch.randint(0, 256, (96, 96, 3), generator=draw).byte().numpy())
    given = question(processor, picture, WORDS)
    image_token = theirs.config.image_token_id
    text = given["input_ids"][0].tolist()
    first = text.index(image_token)
    ids = [*text[:first], -200, *text[first + text.count(image_token) :]]
    ours.set_compression("cdpruner", keep=28, trace=True)
    try:
        ours(torch.tensor([ids]), images=given["pixel_values"])
        kept = ours.compression_trace[0].kept(0)
    finally:
        ours.set_compression(None)
    found = {}
    for name, one in (("clip", clip), ("text", None)):
        with libra.attach(theirs, "cdpruner", keep=28, clip=one, trace=True) as handle:
            theirs(**given)
            found[name] = handle.trace[0].kept(0)
            model, copied = copy.deepcopy((theirs, handle))
        model(**given)
        assert copied.trace[0].kept(0) == found[name]
    assert found["clip"] == kept != found["text"]
    with libra.attach(theirs, "cdpruner", keep=28, clip=clip) as handle:
        beams = theirs.generate(**given, num_beams=2, num_return_sequences=2, max_new_tokens=2)
        assert len(beams) == 2


def test_a_newline_counts_as_little_as_the_least_relevant_patch():
    draw = torch.Generator().manual_seed(4)
    hidden = torch.randn(1, 9, 16, generator=draw)
    cosines = torch.tensor([[0.1, 0.3, 0.2, 0.0, 0.25, 0.15, 0.05, 0.22, 0.0]])  # low ones are relevant
    outside = torch.zeros(1, 9, dtype=torch.bool)
    outside[0, [3, 8]] = True
    for keep in (3, 5):
        c = Compression(method="cdpruner", keep=keep)
        out = compress(hidden, None, c, context=Context(relevance=cosines, outside=outside))
        assert not {3, 8} & set(out.targets[0].tolist())
        worst = cosines.masked_fill(outside, 0.3)
        same = compress(hidden, None, c, context=Context(relevance=worst))
        assert torch.equal(same.targets, out.targets)


@pytest.mark.parametrize(
    "text, left", [("\nWhat? ASSISTANT:", "What?"), ("Why? assistant\n\n", "Why?"), ("Who? [/INST]", "Who?")]
)
def test_the_next_role_is_no_part_of_the_question(text, left):
    clip = ClipRelevance(None, None, lambda ids: {(1,): "before", (2,): text, (): ""}[tuple(ids)])
    assert clip.question(Asked((1,), (2,))) == left
    assert clip.question(Asked((1,), ())) == "before"


def test_where_there_is_no_whole_clip_text_embeddings_are_compared(tmp_path):
    CLIPModel.from_pretrained(TOWER).vision_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not a whole CLIP: it is of type 'clip_vision_model'"):
        ClipRelevance.load(tmp_path, None)
    tokenizer, model, _, _ = load_pretrained_model(str(EMBEDDED), None, "mini", device="cpu")
    model.name_clip(str(tmp_path), tokenizer)
    with pytest.warns(UserWarning, match="text embeddings instead of CLIP's: .* is not a whole CLIP"):
        model.set_compression("cdpruner", keep=28)
    assert model.clip is None
    pixels = torch.randn(1, 3, 96, 96)
    model(torch.tensor([ids_of(tokenizer, f"<image> {WORDS}")]), images=pixels)
    assert model.compression_stats["visual_tokens"] == [[28]] * 12


def test_another_tower_s_clip_is_refused(stock):
    with pytest.raises(ValueError, match="features of width 128, and those of this .* have width 16"):
        libra.attach(tiny.hf_model(), "cdpruner", ratio=0.5, clip=stock[2])
