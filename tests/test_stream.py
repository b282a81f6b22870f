"""The engine in llava's decoder: batches, caches, later turns, labels, gradients, against the decoder by hand
in plain.py."""

import copy
from collections import Counter

import plain
import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

from libra import Compression
from libra.budget import actual
from libra.engine.tokens import Prefill, VisualTokens
from libra.engine.transformers_api import cache_argument, cache_of

CLOSE = dict(atol=1e-4, rtol=1e-4)
SELECTS = ("intervals", "topk", "random", "information")
MERGES = ("drop", "average", "igm", "igm-pos", "igm-neg")
METHODS = ("libra", "fastv", "turbo", "windowed-fastv", "random", "pyramiddrop")

# Between the similarities of the rows that are alike and of those that are not: compensation tokens in some
# rows only.
TAU = 0.6
CHOICES = {
    "libra": dict(method="libra", layers=(1, 3), tau=TAU),
    "reserved": dict(method="libra", layers=(1, 3), tau=TAU, compensation="reserved"),
    "one layer": dict(method="libra", layers=(2,), ratio=0.8, tau=TAU),
    "after the last layer": dict(method="libra", layers=(0, 5), tau=TAU),
    "fastv": dict(method="fastv", layers=(1,), ratio=0.75),
    "turbo": dict(method="turbo", layers=(1, 2)),
    "random": dict(method="random", layers=(0, 3)),
    "mean of the instruction": dict(method="libra", layers=(1, 3), tau=TAU, importance="mean"),
    "compact": dict(method="libra", layers=(1, 3), tau=TAU, positions="compact"),
    "next layer": dict(method="libra", layers=(1, 3), tau=TAU, score_layer="next"),
    "pyramiddrop": dict(method="pyramiddrop", layers=(0, 2, 4)),
}
every_choice = pytest.mark.parametrize(
    "c", [pytest.param(Compression(**keys), id=name) for name, keys in CHOICES.items()]
)
both_sides = pytest.mark.parametrize("side", ["left", "right"])


@pytest.fixture(scope="module")
def shared():
    return tiny.llava_model()


@pytest.fixture
def model(shared):
    yield shared
    shared.set_compression(None)
    shared.zero_grad()


def ragged() -> list[tiny.Row]:
    """Two images that differ; one whose tokens are alike; no image; three short images, right at the
    start."""
    patterns = ("t3 v12 t4 v8 t3", "t2 v20 t6", "t7", "v5 t2 v7 t1 v6 t4")
    return [
        tiny.row(pattern, seed, alike=0.95 if seed == 1 else 0.0) for seed, pattern in enumerate(patterns)
    ]


def by_hand(model, r: tiny.Row, answer=()) -> plain.Outcome:
    """Row ``r`` with the ids of ``answer`` after it, scored by its own last column."""
    embeds = torch.cat([r.embeds, model.get_input_embeddings()(torch.tensor(answer, dtype=torch.long))])
    prefills = [plain.Prefill.of(r.visual, len(r) - 1, model.compression)]
    return plain.decode(model.model, model.lm_head, embeds, model.compression, prefills)


def lengths(cache) -> list[int]:
    return [layer.keys.shape[2] for layer in cache.layers]


# --- the plain model ---


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [None, "left", "right"])
@torch.no_grad()
def test_without_compression_layers_it_is_transformers_llama_bit_for_bit(attention, padding):
    model = tiny.llava_model(attention=attention)
    theirs = LlamaForCausalLM._from_config(model.config, attn_implementation=attention).eval()
    theirs.load_state_dict(model.state_dict())
    rows = ragged()[:2]
    given = tiny.alone(rows[0]) if padding is None else tiny.collate(rows, padding)
    for compression in (None, Compression(method="vanilla"), Compression(layers=())):
        model.set_compression(compression)
        ours = model(**given, use_cache=True)
        want = theirs(**{k: v for k, v in given.items() if k != "visual_mask"}, use_cache=True)
        assert torch.equal(ours.logits, want.logits)
        if padding == "right":
            continue
        step = {"input_ids": torch.full((len(want.logits), 1), 5)}
        if padding:
            step["attention_mask"] = torch.cat(
                [given["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1
            )
            step["position_ids"] = given["position_ids"][:, -1:] + 1
        for _ in range(2):
            ours, want = (
                m(**step, **cache_argument(cache_of(o))) for m, o in ((model, ours), (theirs, want))
            )
            assert torch.equal(ours.logits, want.logits)
            if padding:
                step["attention_mask"] = torch.nn.functional.pad(step["attention_mask"], (0, 1), value=1)
                step["position_ids"] = step["position_ids"] + 1
    assert type(cache_of(ours)) is DynamicCache


@both_sides
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_ratio_zero_at_every_layer_changes_no_bit(model, method, side):
    """Score, select and merge run and W is the identity."""
    given = tiny.collate(ragged(), side)
    valid = given["attention_mask"].bool()
    want = model(**given).logits
    answer = tiny.generate(model, given, num_beams=2) if side == "left" else None
    model.set_compression(
        Compression(method=method, layers=tuple(range(5 if method == "pyramiddrop" else 6)), ratio=0.0)
    )
    with tiny.watched() as steps:
        got = model(**given).logits
    assert len(steps) == len(model.compression.layers)
    assert torch.equal(got[valid], want[valid])
    if side == "left":
        assert torch.equal(tiny.generate(model, given, num_beams=2), answer)


# --- batches ---


@both_sides
@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("select", SELECTS)
@torch.no_grad()
def test_a_batch_is_each_row_alone(model, select, merge, side):
    tau = {"tau": TAU} if merge == "igm" else {}
    model.set_compression(Compression(select=select, merge=merge, layers=(1, 3), ratio=0.5, **tau))
    rows = ragged()
    batched = model(**tiny.collate(rows, side)).logits
    stats = model.compression_stats
    if merge == "igm":
        assert stats["compensation_tokens"][1] == [1, 0, 0, 1]  # in some rows and not in others
    for b, r in enumerate(rows):
        single = model(**tiny.alone(r)).logits[0]
        torch.testing.assert_close(single, by_hand(model, r).logits, **CLOSE)
        torch.testing.assert_close(tiny.own(batched[b], len(single), side), single, **CLOSE)
        if r.visual.any():
            counts = [layer[0] for layer in model.compression_stats["visual_tokens"]]
            assert counts == [layer[b] for layer in stats["visual_tokens"]]


@both_sides
@every_choice
@torch.no_grad()
def test_every_choice_in_a_batch_is_what_it_is_by_hand(model, c, side):
    model.set_compression(c)
    rows = ragged()
    batched = model(**tiny.collate(rows, side)).logits
    for b, r in enumerate(rows):
        want = by_hand(model, r).logits
        torch.testing.assert_close(tiny.own(batched[b], len(want), side), want, **CLOSE)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 2 / 3, 0.95])
@torch.no_grad()
def test_stats_count_whole_tokens_of_each_span(model, ratio):
    model.set_compression(Compression(method="libra", layers=(0, 2, 3), ratio=ratio))
    rows = ragged()
    model(**tiny.collate(rows, "left"))
    spans = [[12, 8], [20], [], [5, 7, 6]]
    want = [actual(model.compression, 6, row) for row in spans]
    assert list(map(list, zip(*model.compression_stats["visual_tokens"], strict=True))) == want


@torch.no_grad()
def test_visual_tokens_up_to_the_last_column(model):
    """A row that ends with its image is scored by its last visual token, which may be dropped at the first
    layer."""
    model.set_compression(Compression(method="fastv", layers=(0, 1, 3), ratio=0.6))
    rows = [tiny.row("t2 v14", 5), tiny.row("v9 t3", 6)]
    batched = model(**tiny.collate(rows, "left")).logits
    for b, r in enumerate(rows):
        want = by_hand(model, r).logits
        torch.testing.assert_close(tiny.own(batched[b], len(want), "left"), want, **CLOSE)


# --- what the layers are given ---


@pytest.mark.parametrize("batch", ["one row", "left", "right"])
@torch.no_grad()
def test_what_the_layers_are_given(model, batch):
    """No position ids; no mask for a row alone, else the stage's own; the probe at the compression layers
    only."""
    c = Compression(method="libra", layers=(1, 3), tau=TAU)
    model.set_compression(c)
    rows = ragged()
    given = tiny.alone(rows[0]) if batch == "one row" else tiny.collate(rows, batch)
    seen = []

    def spy(module, args, kwargs):
        seen.append((kwargs, (args[0] if args else kwargs["hidden_states"]).shape[1]))

    hooks = [layer.self_attn.register_forward_pre_hook(spy, with_kwargs=True) for layer in model.model.layers]
    try:
        out = model(**given, use_cache=True)
        prefill, seen[:] = list(seen), []
        mask = (
            None if batch == "one row" else torch.nn.functional.pad(given["attention_mask"], (0, 1), value=1)
        )
        if batch != "right":
            model(
                input_ids=torch.full((len(out.logits), 1), 5),
                attention_mask=mask,
                **cache_argument(cache_of(out)),
            )
    finally:
        for hook in hooks:
            hook.remove()

    widths = [length for _, length in prefill]
    assert widths[0] == given["inputs_embeds"].shape[1]
    assert widths[0] == widths[1] > widths[2] == widths[3] > widths[4] == widths[5]
    for i, (kwargs, length) in enumerate(prefill):
        assert kwargs.get("position_ids") is None
        assert (kwargs.get("score_probe") is not None) == (i in c.layers)
        assert kwargs["position_embeddings"][0].shape[1] == length
        if batch == "one row":
            assert kwargs["attention_mask"] is None
        else:
            assert kwargs["attention_mask"].shape == (4, 1, length, length)
    for (kwargs, length), width in zip(seen, widths, strict=batch != "right"):
        assert length == 1 and kwargs.get("position_ids") is None and kwargs.get("score_probe") is None
        if batch == "one row":
            assert kwargs["attention_mask"] is None
        else:
            assert kwargs["attention_mask"].shape == (4, 1, 1, width + 1)


class Synchronisations(TorchDispatchMode):
    """Counts what would make the host wait for a device: values that leave it, and results whose shape
    depends on values."""

    WAITING = {
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "equal",
        "is_nonzero",
        "unique_dim",
        "_unique2",
    }

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if (
            name in self.WAITING
            or by_mask
            or name == "repeat_interleave"
            and isinstance(args[0], torch.Tensor)
        ):
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


@every_choice
@torch.no_grad()
def test_at_most_one_synchronisation_a_compression_layer(model, c, monkeypatch):
    model.set_compression(c)
    counts, compress = [], VisualTokens.compress

    def counted(tokens, hidden, attention):
        to_list = torch.Tensor.tolist
        with Synchronisations() as seen, monkeypatch.context() as patch:
            # A list of a CPU tensor is read without the dispatcher.
            patch.setattr(
                torch.Tensor, "tolist", lambda tensor: seen.counts.update(["tolist"]) or to_list(tensor)
            )
            result = compress(tokens, hidden, attention)
        counts.append(seen.counts)
        return result

    monkeypatch.setattr(VisualTokens, "compress", counted)
    model(**tiny.collate(ragged(), "left"))
    assert len(counts) == len(c.layers)
    for count in counts:
        assert count.total() == (0 if c.reserves or c.merge in ("drop", "average") else 1), count


# --- decoding ---


@every_choice
@torch.no_grad()
def test_cached_decoding_is_the_cache_free_forward_that_replays_the_choice(model, c):
    """A batch padded on the left; greedy ids and the logits of every step, by hand and with
    ``score_columns``."""
    model.set_compression(c)
    rows, steps = ragged(), 5
    answer = tiny.generate(
        model, tiny.collate(rows, "left"), steps, return_dict_in_generate=True, output_logits=True
    )
    logits = torch.stack(answer.logits, 1)
    for b, r in enumerate(rows):
        ids = answer.sequences[b].tolist()
        want = by_hand(model, r, ids[:-1]).logits[-steps:]
        torch.testing.assert_close(logits[b], want, **CLOSE)
        assert ids == want.argmax(-1).tolist()

        longer = torch.cat([r.embeds, model.get_input_embeddings()(torch.tensor(ids[:-1]))])[None]
        visual = torch.nn.functional.pad(r.visual, (0, steps - 1))[None]
        again = model(
            inputs_embeds=longer, visual_mask=visual, score_columns=torch.tensor([len(r) - 1])
        ).logits[0, -steps:]
        torch.testing.assert_close(again, want, **CLOSE)
        assert torch.equal(tiny.generate(model, tiny.alone(r), steps)[0], answer.sequences[b])


@pytest.mark.parametrize("name", ["libra", "pyramiddrop"])
@torch.no_grad()
def test_beams_and_several_sequences(model, name):
    model.set_compression(Compression(**CHOICES[name]))
    rows = ragged()
    batched = tiny.generate(model, tiny.collate(rows, "left"), 4, num_beams=3, num_return_sequences=2)
    assert batched.shape == (8, 4)
    for b, r in enumerate(rows):
        single = tiny.generate(model, tiny.alone(r), 4, num_beams=3, num_return_sequences=2)
        assert torch.equal(single, batched[2 * b : 2 * b + 2])

    torch.manual_seed(0)
    options = dict(do_sample=True, num_return_sequences=3, return_dict_in_generate=True, output_logits=True)
    drawn = tiny.generate(model, tiny.collate(rows, "left"), 4, **options)
    assert len({tuple(ids) for ids in drawn.sequences.tolist()}) > len(rows)
    for k, ids in enumerate(drawn.sequences.tolist()):
        want = by_hand(model, rows[k // 3], ids[:-1]).logits[-4:]
        torch.testing.assert_close(torch.stack(drawn.logits, 1)[k], want, **CLOSE)


class Chat:
    """A conversation on one cache: a batch of rows a turn, padded on the left, then answers token by
    token."""

    def __init__(self, model, padded: bool):
        self.model, self.padded, self.cache = model, padded, DynamicCache()
        self.mask = torch.zeros(0)

    def fork(self) -> "Chat":
        """The same conversation on a deep copy of its cache."""
        other = Chat(self.model, self.padded)
        other.cache, other.mask = copy.deepcopy(self.cache), self.mask
        return other

    def _call(self, mask, **given):
        self.mask = mask if self.cache.get_seq_length() == 0 else torch.cat([self.mask, mask], 1)
        if self.padded:
            given["position_ids"] = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -mask.shape[1] :]
            given["attention_mask"] = self.mask
        return self.model(**given, **cache_argument(self.cache), use_cache=True).logits

    def turn(self, rows):
        batch = tiny.collate(rows, "left")
        return self._call(
            batch["attention_mask"], inputs_embeds=batch["inputs_embeds"], visual_mask=batch["visual_mask"]
        )

    def say(self, ids):
        return self._call(torch.ones(len(ids), 1, dtype=torch.long), input_ids=torch.tensor(ids)[:, None])[
            :, -1
        ]


TURNS = [
    [tiny.row("t3 v12 t4", 1), tiny.row("t4 v9 t2 v6 t3", 2), tiny.row("t5", 3)],
    [tiny.row("t2 v8 t5", 11), tiny.row("t3", 12), tiny.row("v7 t4 v9 t2", 13, alike=0.95)],
]


@pytest.mark.parametrize("padded", [False, True], ids=["one row", "batch"])
@every_choice
@torch.no_grad()
def test_a_second_turn_with_new_images_on_the_same_cache(model, c, padded):
    """The first turn's tokens stay as they were compressed; the new ones are scored by the new last token."""
    model.set_compression(c)
    numbers = range(3) if padded else range(1)
    chat = Chat(model, padded)
    got = [chat.turn([TURNS[0][b] for b in numbers])[:, -1]]
    got += [chat.say([5 + t + b for b in numbers]) for t in (0, 10)]
    got += [chat.turn([TURNS[1][b] for b in numbers])[:, -1]]
    got += [chat.say([30 + t + b for b in numbers]) for t in (0, 10)]
    for b in numbers:
        first, second = TURNS[0][b], TURNS[1][b]
        said = [[5 + b, 15 + b], [30 + b, 40 + b]]
        start = len(first) + 2
        parts = [first.embeds, model.get_input_embeddings()(torch.tensor(said[0])), second.embeds]
        embeds = torch.cat([*parts, model.get_input_embeddings()(torch.tensor(said[1]))])
        scorer = start + len(second) - 1
        prefills = [
            plain.Prefill.of(first.visual, len(first) - 1, c),
            plain.Prefill.of(second.visual, scorer, c, start),
        ]
        want = plain.decode(model.model, model.lm_head, embeds, c, prefills)
        at = [len(first) - 1, len(first), len(first) + 1, scorer, scorer + 1, scorer + 2]
        places = [want.source.index(column) for column in at]
        torch.testing.assert_close(torch.stack([logits[b] for logits in got]), want.logits[places], **CLOSE)


@pytest.mark.parametrize("score_layer", ["same", "next"])
@torch.no_grad()
def test_compact_positions_count_on_where_the_first_columns_are_dropped(model, score_layer):
    """A later turn that begins with an image whose first tokens go: its columns still follow those of the
    turn before."""
    c = Compression(method="fastv", layers=(0, 2), ratio=0.7, positions="compact", score_layer=score_layer)
    model.set_compression(c)
    first, begins = tiny.row("v9 t4", 1), []
    for seed in range(6):
        second = tiny.row("v9 t4", 20 + seed)
        chat = Chat(model, padded=False)
        chat.turn([first])
        with tiny.watched() as steps:
            got = chat.turn([second])[0, -1]
        begins.append(steps[0].targets()[0])
        prefills = [plain.Prefill.of(first.visual, 12, c), plain.Prefill.of(second.visual, 25, c, 13)]
        want = plain.decode(model.model, model.lm_head, torch.cat([first.embeds, second.embeds]), c, prefills)
        torch.testing.assert_close(got, want.logits[-1], **CLOSE)
    assert min(begins) < max(begins)


@torch.no_grad()
def test_text_before_the_first_image_may_fill_the_cache_without_compression(model):
    """A cache that the plain model filled with text is taken over; a padded one too."""
    rows = [TURNS[0][2], tiny.row("t3", 21)]
    for padded in (False, True):
        numbers = range(2) if padded else range(1)
        model.set_compression(None)
        chat = Chat(model, padded)
        chat.turn([rows[b] for b in numbers])
        model.set_compression(Compression(**CHOICES["libra"]))
        chat.turn([TURNS[0][b] for b in numbers])
        got = chat.say([7 for _ in numbers])
        for b in numbers:
            joined = torch.cat(
                [rows[b].embeds, TURNS[0][b].embeds, model.get_input_embeddings()(torch.tensor([7]))]
            )
            prefill = plain.Prefill.of(TURNS[0][b].visual, len(joined) - 2, model.compression, len(rows[b]))
            want = plain.decode(model.model, model.lm_head, joined, model.compression, [prefill])
            torch.testing.assert_close(got[b], want.logits[-1], **CLOSE)


# --- the cache ---


def filled(model, c, padded=True) -> Chat:
    """A chat of three rows after its prefill; some rows have a compensation token and some do not."""
    model.set_compression(c)
    chat = Chat(model, padded)
    chat.turn(ragged()[:3] if padded else ragged()[:1])
    return chat


@pytest.mark.parametrize("name", ["libra", "compact"])
@torch.no_grad()
def test_copies_of_the_cache(model, name):
    """deepcopy, reorder, repeat and select carry the stage masks and positions."""
    chat = filled(model, Compression(**CHOICES[name]))
    before = lengths(chat.cache)
    want = chat.fork().say([5, 6, 7])
    assert lengths(chat.cache) == before

    other = chat.fork()
    order = torch.tensor([2, 0, 1])
    other.cache.reorder_cache(order)
    other.mask = other.mask[order]
    torch.testing.assert_close(other.say([7, 5, 6]), want[order], **CLOSE)

    other = chat.fork()
    other.cache.batch_repeat_interleave(2)
    other.mask = other.mask.repeat_interleave(2, 0)
    torch.testing.assert_close(other.say([5, 5, 6, 6, 7, 7]), want.repeat_interleave(2, 0), **CLOSE)

    other = chat.fork()
    chosen = torch.tensor([0, 2])
    other.cache.batch_select_indices(chosen)
    other.mask = other.mask[chosen]
    torch.testing.assert_close(other.say([5, 7]), want[chosen], **CLOSE)


@pytest.mark.parametrize("padded", [False, True], ids=["one row", "batch"])
@pytest.mark.parametrize("name", ["libra", "compact"])
@torch.no_grad()
def test_crop_takes_back_the_newest_tokens(model, name, padded):
    chat = filled(model, Compression(**CHOICES[name]), padded)
    rows = len(chat.mask)
    want = [chat.say([token] * rows) for token in (5, 6, 7)]
    full = lengths(chat.cache)
    chat.cache.crop(-2)
    chat.mask = chat.mask[:, :-2]
    assert lengths(chat.cache) == [n - 2 for n in full]
    for token, logits in zip((6, 7), want[1:], strict=True):
        torch.testing.assert_close(chat.say([token] * rows), logits, **CLOSE)
    chat.cache.crop(0)
    assert lengths(chat.cache) == full
    with pytest.raises(ValueError, match="tokens to remove as a negative number, but got 3"):
        chat.cache.crop(3)


@pytest.mark.parametrize("name", ["libra", "compact"])
@torch.no_grad()
def test_crop_takes_back_a_text_turn_with_its_padding(model, name):
    chat = filled(model, Compression(**CHOICES[name]))
    want, full = chat.fork().say([5, 6, 7]), chat.cache.get_seq_length()
    mask = chat.mask
    chat.turn([tiny.row("t2", 1), tiny.row("t5", 2), tiny.row("t3", 3)])
    chat.cache.crop(full - chat.cache.get_seq_length())
    chat.mask = mask
    torch.testing.assert_close(chat.say([5, 6, 7]), want, **CLOSE)


@torch.no_grad()
def test_crop_into_a_compressed_prompt_is_refused(model):
    """The later layers no longer hold its tokens one by one."""
    chat = filled(model, Compression(**CHOICES["libra"]), padded=False)
    chat.say([5])
    before, end = lengths(chat.cache), chat.cache.compressed_until
    with pytest.raises(
        ValueError, match=f"crop keeps at least the {end} columns up to the last compressed visual token"
    ):
        chat.cache.crop(end - before[0] - 1)
    assert lengths(chat.cache) == before
    chat.cache.crop(end - before[0])
    assert lengths(chat.cache) == [n - (before[0] - end) for n in before]
    chat.cache.reset()
    chat.mask = torch.zeros(0)
    assert chat.cache.get_seq_length() == 0 and chat.cache.compressed_until == 0


@torch.no_grad()
def test_caches_that_cannot_work_are_refused(model):
    c = Compression(**CHOICES["libra"])
    given = tiny.alone(ragged()[0])
    model.set_compression(c)
    with pytest.raises(ValueError, match="needs a DynamicCache, .* got StaticCache"):
        model(**given, **cache_argument(StaticCache(config=model.config, max_cache_len=64)))
    with pytest.raises(ValueError, match="needs a DynamicCache, .* got StaticCache"):
        tiny.generate(model, given, cache_implementation="static")
    cache = cache_of(model(**given, use_cache=True))
    model.set_compression(Compression(method="libra", layers=(2,)))
    with pytest.raises(ValueError, match=r"filled with compression after layers \[1, 3\], not \[2\]"):
        model(input_ids=torch.tensor([[5]]), **cache_argument(cache))


@torch.no_grad()
def test_inputs_that_cannot_work_are_refused(model):
    model.set_compression(Compression(**CHOICES["libra"]))
    given = tiny.collate(ragged()[:2], "left")
    whole = given["inputs_embeds"].shape[1]
    for mask in ([0] + [1] * (whole - 2) + [0], [1, 0] + [1] * (whole - 2)):
        with pytest.raises(ValueError, match="padding on both sides or inside a row"):
            model(**{**given, "attention_mask": torch.tensor([mask, mask])})
    with pytest.raises(ValueError, match="padding on both sides or inside a row"):
        model(**{**given, "attention_mask": torch.tensor([[0] + [1] * (whole - 1), [1] * (whole - 1) + [0]])})
    with pytest.raises(ValueError, match="needs a 2D attention mask"):
        model(**{**given, "attention_mask": torch.zeros(2, 1, whole, whole)})


# --- labels and gradients ---

TALKS = {
    "one answer": ("t3 v8 t3 a4", [13]),
    "several turns": ("t3 v8 t3 a2 t2 v6 t2 a3 t1 v7 t1 a2", [13, 25, 37]),
    "two images before an answer": ("v8 t2 v6 t2 a3", [17, 17]),
    "an image after the last answer": ("v8 t2 a3 v6 t2", [9, 20]),
    "plain template: no instruction": ("t1 v8 a5", [8]),
    "an answer before the image": ("t2 a3 v8 t2 a2", [14]),
    "nothing supervised": ("t2 v8 t4", [13]),
}


@both_sides
@pytest.mark.parametrize("talk", TALKS)
@torch.no_grad()
def test_with_labels_each_image_is_scored_before_the_first_answer_behind_it(model, talk, side):
    pattern, scorers = TALKS[talk]
    r, other = tiny.row(pattern, 1), tiny.row("t30 v9 t4 a6", 2)
    model.set_compression(Compression(**CHOICES["libra"]))
    with tiny.watched() as steps:
        batched = model(**tiny.collate([r, other], side, labels=True)).logits
    offset = len(other) - len(r) if side == "left" else 0
    assert sorted(set((steps[0].queries[0] - offset).tolist()) - {len(r) - 1}) == sorted(
        set(scorers) - {len(r) - 1}
    )
    prefills = [plain.Prefill.of(r.visual, scorers, model.compression)]
    want = plain.decode(model.model, model.lm_head, r.embeds, model.compression, prefills).logits
    torch.testing.assert_close(tiny.own(batched[0], len(want), side), want, **CLOSE)


@both_sides
@every_choice
@torch.no_grad()
def test_labels_shorten_with_the_tokens(model, c, side):
    rows = [tiny.row(pattern, seed) for seed, (pattern, _) in enumerate(TALKS.values()) if "a" in pattern]
    model.set_compression(c)
    given = tiny.collate(rows, side, labels=True)
    told = Prefill(given["visual_mask"], given["labels"])
    inner = {name: given[name] for name in ("inputs_embeds", "attention_mask", "position_ids")}
    out = model.model(**inner, prefill=told)
    assert out.labels.shape == out.last_hidden_state.shape[:2]
    loss = model(**given).loss
    assert loss.isfinite()
    total = 0.0
    for b, (r, (_, scorers)) in enumerate(zip(rows, TALKS.values(), strict=False)):
        left = out.labels[b][out.labels[b] != -100]
        assert torch.equal(left, r.labels[r.labels != -100])  # none is lost, and their order stays
        total += plain.decode(
            model.model, model.lm_head, r.embeds, c, [plain.Prefill.of(r.visual, scorers, c)]
        ).loss(r.labels)
    torch.testing.assert_close(loss, total / (given["labels"] != -100).sum(), **CLOSE)


@every_choice
@torch.no_grad()
def test_the_choice_does_not_depend_on_the_answer(model, c):
    model.set_compression(c)
    r = tiny.row(TALKS["several turns"][0], 1)
    first = int((r.labels != -100).nonzero()[0])
    last_answer = int((r.labels != -100).nonzero()[-1])
    with tiny.watched() as steps:
        model(**tiny.collate([r], labels=True))
        # Only what stands before the first answer decides on the first image, whatever the later turns are.
        other = tiny.Row(r.embeds.clone(), r.visual, r.labels)
        other.embeds[last_answer - 1 :] = tiny.row("t2", 9).embeds
        model(**tiny.collate([other], labels=True))
        short = tiny.Row(r.embeds[:first], r.visual[:first], r.labels[:first])
        model(**tiny.alone(short))
    count = len(c.layers)
    for before, after in zip(steps[:count], steps[count : 2 * count], strict=True):
        assert before.targets() == after.targets() and torch.equal(
            before.outcome.groups, after.outcome.groups
        )
        torch.testing.assert_close(before.outcome.token_weights, after.outcome.token_weights)
    if c.select != "random":  # which is drawn from the number of visual tokens too
        assert steps[0].targets()[: len(steps[-count].targets())] == steps[-count].targets()


@pytest.mark.parametrize("checkpointing", [False, True])
@every_choice
def test_gradients_are_those_of_the_computation_by_hand(c, checkpointing):
    model = tiny.llava_model(layers=6, seed=3)
    model.set_compression(c)
    talks = [TALKS[name] for name in ("one answer", "several turns", "plain template: no instruction")]
    rows = [tiny.row(pattern, seed) for seed, (pattern, _) in enumerate(talks)]
    given = tiny.collate(rows, labels=True)
    given["inputs_embeds"].requires_grad_()
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**given, use_cache=False).loss.backward()
    model.gradient_checkpointing_disable()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    total = 0.0
    leaves = [r.embeds.clone().requires_grad_() for r in rows]
    for leaf, r, (_, scorers) in zip(leaves, rows, talks, strict=True):
        prefills = [plain.Prefill.of(r.visual, scorers, c)]
        total = total + plain.decode(model.model, model.lm_head, leaf, c, prefills).loss(r.labels)
    (total / (given["labels"] != -100).sum()).backward()
    want = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys() and len(want) > 50
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    for b, (leaf, r) in enumerate(zip(leaves, rows, strict=True)):
        torch.testing.assert_close(given["inputs_embeds"].grad[b, : len(r)], leaf.grad, atol=1e-5, rtol=1e-4)
