"""The plug-in for vLLM as far as it needs no vLLM: which compressions qualify, counts, positions, cache keys,
and the tokens of several pictures. What runs in vLLM is in test_vllm_engine.py."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import libra
from libra import Compression
from libra.config import ConfigError
from libra.engine.tower import Listener, Look, Wants, scores
from libra.methods import METHODS
from libra.vllm import positions, settings, shorten, sight

N, WIDTH = 16, 8
RESERVED = {"method": "libra-input", "compensation": "reserved"}
ROOT = Path(__file__).parents[1]
SERVED = (
    "divprune", "fastervlm", "hiprune", "holov", "pool", "prumerge", "prumerge-plus", "tome", "vispruner",
    "visionzip", "vscan",
)  # fmt: skip


def compression(**keys) -> Compression:
    return Compression(**{"at": "input", **keys})


# --- what qualifies ---


@pytest.mark.parametrize("method", [*SERVED, "random"])
def test_methods_that_see_only_the_picture_qualify(method):
    c = Compression(method=method, **({"at": "input"} if method == "random" else {}))
    assert settings.qualified(c) is c


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"method": "libra"}, "one length of a sequence for all layers"),
        ({"method": "fastv", "layers": (3,)}, "one length of a sequence for all layers"),
        ({"method": "cdpruner"}, "compares with the question"),
        ({"steps": [{"at": "input", "method": "divprune"}, {"at": 3, "method": "fastv"}]}, "here are 2"),
        ({"at": "input", "method": "divprune", "flops": 0.5}, "budget of a whole model"),
        ({"method": "libra-input"}, "write compensation: reserved"),
        ({"method": "downsample"}, "smaller picture"),
        ({"method": "evs"}, "frames of a video"),
        ({"method": "vidcom2"}, "frames of a video"),
        ({"method": "uniform-frames"}, "frames of a video"),
        ({"method": "prumerge", "keep": "adaptive"}, "nothing can be counted beforehand"),
    ],
)
def test_other_compressions_are_refused_in_one_sentence(keys, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        settings.qualified(Compression(**keys))
    assert "\n" not in str(caught.value)


def test_libra_at_the_input_qualifies_with_a_reserved_slot():
    c = settings.qualified(Compression(**RESERVED, ratio=0.5))
    assert [settings.slots(c, N, kept) for kept in (N, 8, 1)] == [N, 9, 2]
    assert settings.slots(settings.NOTHING, N, N) == N
    assert settings.slots(compression(method="divprune"), N, 8) == 8
    assert settings.server_compression(c.to_dict()) == c


def test_which_methods_qualify_and_with_which_keys():
    """docs/methods.md has the list, written by the same code."""
    found = {name: settings.added(name) for name in METHODS if name != "vanilla"}
    qualify = {name: Compression(method=name, **keys) for name, keys in found.items() if keys is not None}
    assert {*qualify} >= {*SERVED, "random", "libra-input"}
    of_qwen = {name for name, c in qualify.items() if settings.reads_the_reader(c)}
    assert of_qwen >= {"prumerge", "prumerge-plus"}
    assert found["random"] == {"at": "input"} and found["libra-input"] == {"compensation": "reserved"}


def test_a_list_of_one_step_is_that_step():
    c = Compression(steps=[{"at": "input", "method": "divprune", "keep": 4}], positions="compact")
    assert settings.qualified(c) == compression(method="divprune", keep=4, positions="compact")


def test_overrides_count_more_than_the_variable(monkeypatch, tmp_path):
    assert settings.server_compression() == settings.NOTHING
    row = tmp_path / "row.yaml"
    row.write_text("{method: divprune, keep: 3}")
    monkeypatch.setenv(settings.ENVIRONMENT, str(row))
    assert settings.server_compression().keep == 3
    assert settings.server_compression({"method": "visionzip", "ratio": 0.75}).ratio == 0.75
    monkeypatch.setenv(settings.ENVIRONMENT, "llava7b_r50")
    with pytest.raises(ConfigError, match="one length"):
        settings.server_compression()


def test_a_compression_comes_back_from_the_configuration_that_carries_it_to_other_processes():
    for c in (settings.NOTHING, *(Compression(method=name, keep=5) for name in SERVED)):
        assert settings.server_compression(c.to_dict()) == c


LLAVA = SimpleNamespace(
    model_type="llava",
    vision_config=SimpleNamespace(model_type="clip_vision_model"),
    vision_feature_select_strategy="default",
    vision_feature_layer=-2,
)
QWEN = SimpleNamespace(model_type="qwen2_5_vl")


def test_a_model_that_cannot_give_it_is_refused():
    zip_ = Compression(method="visionzip")
    assert settings.fitted(zip_, LLAVA) is zip_
    assert settings.fitted(zip_, QWEN).at == "input"  # its projector joins patches
    for keys, word in (
        ({"vision_config": SimpleNamespace(model_type="pixtral")}, "pixtral"),
        ({"vision_feature_select_strategy": "full"}, "full"),
        ({"vision_feature_layer": [-2, -5]}, "list"),
    ):
        with pytest.raises(ConfigError, match=word):
            settings.fitted(zip_, SimpleNamespace(**{**vars(LLAVA), **keys}))
    with pytest.raises(ConfigError, match="does not load it"):
        settings.fitted(Compression(method="prumerge"), LLAVA)
    with pytest.raises(ConfigError, match="three axes"):
        settings.fitted(compression(method="divprune", positions="compact"), QWEN)
    assert settings.fitted(settings.NOTHING, SimpleNamespace()) is settings.NOTHING


# --- a request's own ratio, counts and cache keys ---


def test_a_request_may_bring_its_own_ratio():
    c = compression(method="divprune", keep=3)
    assert settings.with_request(c, {"size": 7}) is c
    assert settings.targets(c, N) == 3
    assert settings.targets(settings.with_request(c, {settings.RATIO: 0.75}), N) == 4
    assert settings.targets(settings.with_request(c, {settings.RATIO: 0}), N) == N
    for bad in (1, -0.5, "much", True, [0.5]):
        with pytest.raises(ConfigError, match=settings.RATIO):
            settings.with_request(c, {settings.RATIO: bad})
    with pytest.raises(ConfigError, match="compresses nothing"):
        settings.with_request(settings.NOTHING, {settings.RATIO: 0.5})


def test_method_and_rate_are_in_the_cache_key():
    c = compression(method="divprune", ratio=0.5)
    same = settings.with_request(compression(method="divprune", keep=3), {settings.RATIO: 0.5})
    assert settings.cache_key(c) == settings.cache_key(same)
    others = [
        settings.with_request(c, {settings.RATIO: 0.25}),
        compression(method="visionzip", ratio=0.5),
        compression(method="divprune", ratio=0.5, positions="compact"),
        settings.NOTHING,
    ]
    assert len({settings.cache_key(one) for one in (c, *others)}) == 5


# --- positions ---


def test_distances_survive_half_precision():
    back = torch.tensor([[1], [127], [128], [577], [16383]])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        tokens, again = positions.split(positions.append(torch.ones(5, 3, dtype=dtype), back), axes=1)
        assert tokens.dtype == dtype and tokens.shape == (5, 3) and torch.equal(again, back)
    with pytest.raises(ValueError, match="16383"):
        positions.append(torch.ones(1, 3), torch.tensor([[128**2]]))


def plainly(length: int, pictures, places) -> list[int]:
    """Positions of a prompt, one column after another; places: of each picture those of its tokens."""
    found, at = [], 0
    for (first, columns, width), own in zip(pictures, places):
        while len(found) < first:
            found.append(at)
            at += 1
        found += [at + place for place in own]
        assert len(own) == columns
        at += width
    while len(found) < length:
        found.append(at)
        at += 1
    return [*found, at]


@pytest.mark.parametrize("pieces", [[40], [7, 33], [10, 5, 1, 24], [1] * 40])
def test_pieces_of_a_prompt_get_the_positions_of_the_whole(pieces):
    """Three pictures, two of them next to each other, in pieces that begin and end anywhere."""
    pictures, places = [(3, 6, 16), (9, 4, 16), (20, 5, 5)], [
        [0, 1, 5, 7, 11, 15], [2, 3, 4, 5], [0, 1, 2, 3, 4]
    ]  # fmt: skip
    ids = [5] * 40
    for first, columns, _ in pictures:
        ids[first : first + columns] = [99] * columns
    expected = plainly(40, pictures, places)
    embedded = [
        positions.append(torch.full((len(own), 2), float(i)), width - torch.tensor(own)[:, None])
        for i, ((_, _, width), own) in enumerate(zip(pictures, places))
    ]
    numbers, following = positions.numbered(40, pictures)
    assert following == expected[-1] - 40
    distances, computed = positions.Distances(1, 40), 0
    for piece in pieces:
        parts = []
        for (first, columns, _), own in zip(pictures, embedded):
            begin, end = max(computed - first, 0), min(computed + piece - first, columns)
            if begin < end:
                parts.append(own[begin:end])
        now = slice(computed, computed + piece)
        if parts:
            tokens = distances.taken(parts, torch.tensor(ids[now]) == 99)
            assert all(torch.equal(one, part[:, :2]) for one, part in zip(tokens, parts))
        assert distances.applied(numbers[0, now]).tolist() == expected[now]
        computed += piece
    assert torch.equal(numbers[0], numbers[2])


def test_positions_of_three_axes():
    numbers, following = positions.numbered(4, [(1, 2, 4)])
    part = positions.append(torch.zeros(2, 2), 4 - torch.tensor([[0, 1, 3], [0, 3, 2]]))
    distances = positions.Distances(3, 8)
    distances.taken([part], torch.tensor([False, True, True, False]))
    assert distances.applied(numbers).T.tolist() == [[0, 0, 0], [1, 2, 4], [1, 4, 3], [5, 5, 5]]
    assert following == 2


def test_after_a_prompt_that_ends_with_a_picture_the_answer_stands_behind_all_of_it():
    numbers, following = positions.numbered(4, [(1, 3, 9)])
    assert 4 + following == 1 + 9 and positions.mark(int(numbers[0, -1])) == 10


# --- tokens ---


def look(seed: int, n: int = N) -> Look:
    g = torch.Generator().manual_seed(seed)
    return Look(
        hidden=torch.randn(n, WIDTH, generator=g),
        outside=torch.zeros(n, dtype=torch.bool),
        grid=((n // 4, 4),),
        cls=torch.rand(2, n, generator=g),
        received=torch.rand(2, n, generator=g),
        keys=torch.randn(n, WIDTH, generator=g),
        next=torch.rand(n, generator=g),
        next_keys=torch.randn(n, WIDTH, generator=g),
    )


def project(tokens: torch.Tensor) -> torch.Tensor:
    return tokens @ torch.linspace(-1, 1, WIDTH * 6).view(WIDTH, 6)


@pytest.mark.parametrize("method", [*SERVED, "random"])
def test_several_pictures_have_the_tokens_of_libra_compress(method):
    c = compression(method=method)
    looks = [look(0), look(1), look(2, 12), look(3)]
    embeddings = [project(one.hidden) for one in looks]
    kept = [5, 5, 3, N]
    found = shorten.shorten(c, embeddings, looks, kept, project)
    for one, seen, embedded, count in zip(found, looks, embeddings, kept):
        if count == len(embedded):
            assert torch.equal(one.tokens, embedded) and one.places.tolist() == list(range(N))
            continue
        context = libra.Context(
            tower_cls=seen.cls[:, None],
            tower_received=seen.received[:, None],
            tower_keys=seen.keys[None],
            tower_hidden=seen.hidden[None],
            tower_next=seen.next[None],
            tower_next_keys=seen.next_keys[None],
            grid=[list(seen.grid)],
        )
        own = compression(method=method, keep=count)
        expected = libra.compress(embedded[None], None, own, context=context)
        torch.testing.assert_close(one.tokens, expected.tokens[0])
        assert one.places.tolist() == expected.targets[0].tolist() and len(one.tokens) == count


@pytest.mark.parametrize("positions", ["original", "compact", "centre"])
def test_a_reserved_compensation_token_comes_last(positions):
    seen = look(6)
    embedded = project(seen.hidden)
    c = Compression(**RESERVED, positions=positions)
    short, whole = shorten.shorten(c, [embedded, embedded], [seen, seen], [4, N], project)
    own = Compression(**RESERVED, keep=4)
    expected = libra.compress(embedded[None], None, own, context=libra.Context(tower_cls=seen.cls[:, None]))
    assert len(short.tokens) == 5 == settings.slots(c, N, 4) and len(whole.tokens) == N
    torch.testing.assert_close(short.tokens, expected.tokens[0])
    last = 4 if positions == "compact" else N - 1
    assert short.places[-1] == last
    if positions == "original":
        assert short.places[:-1].tolist() == expected.targets[0].tolist()


def test_in_the_tower_the_models_projector_runs_on_what_is_left():
    c = Compression(method="visionzip")
    seen = look(4)
    embedded = project(seen.hidden)
    (one,) = shorten.shorten(c, [embedded], [seen], [8], project)
    context = libra.Context(
        tower_cls=seen.cls[:, None], tower_keys=seen.keys[None], tower_hidden=seen.hidden[None]
    )
    own = compression(method="visionzip", keep=8)
    expected = libra.compress(seen.hidden[None], None, own, context=context)
    torch.testing.assert_close(one.tokens, project(expected.tokens[0]))
    assert not torch.equal(one.tokens, embedded[one.places])


def test_places_of_the_three_kinds_of_positions():
    seen = look(5)
    for kind, expected in (("compact", [0, 1, 2]), ("centre", [2, 8, 13]), ("original", None)):
        c = compression(method="divprune", positions=kind)
        (one,) = shorten.shorten(c, [seen.hidden], None, [3], project)
        if expected is None:
            picks = libra.compress(seen.hidden[None], None, compression(method="divprune", keep=3)).targets
            expected = picks[0].tolist()
        assert one.places.tolist() == expected
    assert shorten.width(16, 3, "compact") == 3 and shorten.width(16, 3, "centre") == 16


# --- what a tower says ---


class Attention(torch.nn.Module):
    """As vLLM's: given queries, keys and values of all heads."""

    num_heads, head_size, scale = 2, 4, 0.5

    def forward(self, query, key, value, cu_seqlens=None):
        return value


def test_the_attention_of_the_layers_asked_for_is_heard():
    layers = [Attention() for _ in range(3)]
    wants = Wants.of(Compression(method="hiprune"), has_cls=True)
    eyes = sight.Sight(wants, layers, depth=6, has_cls=True)
    given = torch.randn(3, 2, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    for layer, (query, key) in zip(layers, given):  # nobody listens
        layer(query, key, key)
    with sight.listening(eyes) as listener:
        for layer, (query, key) in zip(layers, given):
            layer(query, key, key)
    looks = sight.pictures(listener, torch.randn(2, 5, WIDTH), (2, 2))
    heads = given.view(3, 2, 2, 5, 2, 4).transpose(3, 4)
    for i, one in enumerate(looks):
        assert one.received.shape == (2, 4) and one.grid == ((2, 2),) and len(one) == 4
        for said, layer in zip(one.received, wants.layers(2, 6)):
            _, received = scores(*heads[layer], 0.5, False, True)
            torch.testing.assert_close(said, received[i, 1:])
    with sight.listening(None) as nobody:
        assert nobody is None


def test_a_sequence_of_several_pictures_is_brought_into_their_order():
    wants = Wants.of(Compression(method="visionzip"), has_cls=False)
    layer = Attention()
    eyes = sight.Sight(wants, [layer], depth=1, has_cls=False)
    query, key = torch.randn(2, 1, 24, 2, 4, generator=torch.Generator().manual_seed(1))
    with sight.listening(eyes) as listener:
        layer(query=query, key=key, value=key, cu_seqlens=torch.tensor([0, 16, 24]))
    order = torch.tensor([2, 0, 1, 3, 5, 4])
    features = torch.arange(24.0)[:, None]
    first, second = sight.windows(listener, features, [(1, 2, 2), (1, 1, 2)], order)
    assert first.hidden[:, 0].tolist() == [9.5, 1.5, 5.5, 13.5]
    assert second.hidden[:, 0].tolist() == [21.5, 17.5]
    own = Listener(wants, False, 0)
    own.hear(0, query.transpose(1, 2)[:, :, :16], key.transpose(1, 2)[:, :, :16], None, {"scaling": 0.5})
    alone = own.joined(own.received)[0, 0].view(4, 4).mean(1)
    torch.testing.assert_close(first.received[0], alone[[2, 0, 1, 3]])
    with sight.listening(eyes), pytest.raises(ValueError, match="mm-encoder-attn-backend"):
        layer(query=query, key=key, value=key, cu_seqlens=torch.tensor([0, 512, 768]))


# --- without vLLM ---


def test_without_vllm_it_says_where_to_get_it():
    code = "import sys; sys.modules['vllm'] = None; import libra.vllm; libra.vllm.register()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("ImportError: libra.vllm is a plug-in for vLLM")


def test_nothing_imports_the_plug_in():
    from test_imports import FILES, imported

    users = {
        name
        for name, path in FILES.items()
        if not name.startswith("libra.vllm")
        for other in imported(path)
        if other.startswith("libra.vllm")
    }
    assert not users
