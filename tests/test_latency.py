"""The measurements: random models of true width, medians and their intervals, counted operations and bytes,
the command."""

import json
from itertools import product
from pathlib import Path
from statistics import median

import pytest
import torch
from PIL import Image
from tiny import hf_model
from transformers import CLIPVisionConfig

from libra.config import Compression, ConfigError
from libra.flops import model_flops
from libra.latency import Bench, Prompt, main, measure, scale_layers
from libra.latency.random_weights import CLIP_L_336, RandomWeights, random_model, weight_bytes
from libra.latency.vision import TOWERS, tower_of, views_of
from libra.rows import ModelSpec, Row, get_model
from libra.utils.files import write_text
from libra.utils.timing import median_interval, paired_ratio, peak_memory, run_in_turns

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
SPEC = ModelSpec(
    name="narrow",
    layers=5,
    hidden_size=512,
    intermediate_size=768,
    kv_size=256,
    visual_tokens=(64,),
    checkpoint="",
)
LIBRA = Compression(method="libra", layers=(1, 3), ratio=0.5)


def test_random_weights_differ_and_keep_activations_finite():
    weights = RandomWeights(torch.float32)
    first, second = (weights.fill("weight", torch.empty(1500, 2000)) for _ in range(2))
    assert abs(float(first.std()) - 2000**-0.5) < 1e-3 * 2000**-0.5 and not torch.equal(first, second)
    assert len(first.unique(dim=0)) == len(first)
    assert weights.fill("norm.weight", torch.empty(5)).tolist() == [1.0] * 5
    assert weights.fill("bias", torch.empty(5)).tolist() == [0.0] * 5

    model = random_model(SPEC, 30, torch.bfloat16)
    assert sum(
        p.numel() for p in model.model.language_model.layers.parameters() if p.ndim > 1
    ) * 2 == weight_bytes(SPEC, 30, torch.bfloat16)
    with torch.inference_mode():
        output = model(input_ids=torch.arange(1, 100)[None], output_hidden_states=True)
    assert all(
        state.isfinite().all() and 1e-3 < float(state.float().std()) < 1e3 for state in output.hidden_states
    )
    assert float(output.logits.float().std()) > 0.1


def test_scaled_layers_keep_their_depth():
    rows = Compression(method="libra", layers=(7, 15, 23), ratio=0.5)
    assert scale_layers(rows, 32, 8) == Compression(method="libra", layers=(1, 3, 5), ratio=0.5)
    assert scale_layers(rows, 32, 32) == rows
    assert scale_layers(Compression(method="fastv", layers=(3,)), 32, 8).layers == (0,)
    for layers in (2, 3):
        with pytest.raises(ConfigError, match="--compression-layers"):
            scale_layers(rows, 32, layers)
    with pytest.raises(ConfigError, match="no places of their own"):
        scale_layers(Compression(method="fastv", layers=(3,)), 32, 3)


@pytest.mark.parametrize("n", [1, 5, 6, 9, 15])
def test_interval_covers_the_median_as_often_as_it_says(n):
    """Each value lies below or above the true median with probability ½: all 2ⁿ ways of it, one by one."""
    found = median_interval([float(i) for i in range(n)])
    assert found.median == (n - 1) / 2 and found.low + found.high == n - 1
    k = int(found.low)  # so many values lie below the lower end
    covered = sum(k < sum(ways) < n - k for ways in product((0, 1), repeat=n)) / 2**n
    assert found.coverage == pytest.approx(covered)
    if n < 6:
        assert (found.low, found.high) == (0, n - 1) and covered < 0.95
    else:
        narrower = sum(k + 1 < sum(ways) < n - k - 1 for ways in product((0, 1), repeat=n)) / 2**n
        assert covered >= 0.95 > narrower
    assert median_interval(list(range(n))[::-1]) == found


def test_runs_alternate():
    order = []
    ways = {name: lambda name=name: order.append(name) or len(order) for name in "abc"}
    runs = run_in_turns(ways, 2)
    assert order == ["a", "b", "c", "c", "b", "a"]
    assert runs == [{"a": 1, "b": 2, "c": 3}, {"a": 6, "b": 5, "c": 4}]
    assert paired_ratio(runs, "b", "a").median == median([2 / 1, 5 / 6])


def test_peak_memory_sees_what_is_gone_again():
    small, large = (peak_memory(lambda n=n: torch.ones(n, dtype=torch.uint8), CPU) for n in (1, 200_000_000))
    assert 150_000_000 < large - small < 400_000_000


@pytest.mark.parametrize(
    "attention, batch, compression",
    [
        ("sdpa", 1, LIBRA),
        ("sdpa", 3, LIBRA),
        ("eager", 1, LIBRA),
        ("sdpa", 1, Compression(method="fastv", layers=(0,))),
        ("sdpa", 2, Compression(method="turbo", layers=(2,), ratio="2/3")),
    ],
)
def test_counted_operations_and_bytes(attention, batch, compression):
    model = random_model(SPEC, SPEC.layers, torch.float32, attention=attention)
    plain = type(model.model.language_model)
    bench = Bench(model, compression, Prompt(visual=64, text=10, batch=batch))
    data = measure(bench, SPEC, pairs=2, steps=2, progress=False)
    assert type(model.model.language_model) is plain

    ratio = 1 - compression.ratio
    tokens = [
        round(64 * ratio ** sum(done < layer for done in compression.layers)) for layer in range(SPEC.layers)
    ]
    seen = data["tokens_per_layer"]
    assert seen["visual"] == tokens and seen["measured"] == [[n] * batch for n in tokens]
    flops = data["flops"]
    assert (
        flops["counted"]["vanilla"]
        == batch * model_flops(SPEC, [74] * SPEC.layers)
        == flops["formula"]["vanilla"]
    )
    assert flops["formula"]["compressed"] == batch * model_flops(SPEC, [10 + n for n in tokens])
    assert (
        1 < flops["counted_over_formula"]["compressed"] < 1.06
    )  # score rows and similarities weigh more in a narrow model

    cache, one = data["cache"], 2 * SPEC.kv_size * 4
    assert cache["vanilla"] == one * batch * SPEC.layers * 74
    assert cache["schedule"] == one * batch * sum(10 + n for n in tokens)
    assert cache["compressed"] == cache["schedule"] + cache["compensation"] + cache["padding"]
    assert (cache["compensation"] > 0) == (compression is LIBRA)

    prefill = data["prefill"]
    ratios = [pair["compressed"]["wall"] / pair["vanilla"]["wall"] for pair in prefill["pairs"]]
    assert prefill["ratio"]["median"] == median(ratios)
    assert (
        0
        < prefill["cpu_time"]["vanilla_seconds"]
        < 1.5 * torch.get_num_threads() * prefill["vanilla_seconds"]
    )
    assert prefill["ratio_over_flops_ratio"] == prefill["ratio"]["median"] / flops["formula"]["ratio"]
    visual = [model_flops(SPEC, counts) for counts in (tokens, [64] * SPEC.layers)]
    assert flops["visual"]["ratio"] == visual[0] / visual[1]
    assert prefill["ratio_over_visual_flops_ratio"] == prefill["ratio"]["median"] / flops["visual"]["ratio"]
    assert data["decode"]["vanilla_seconds"] > 0 and data["decode"]["compressed_seconds"] > 0


def test_padding_of_a_ragged_batch_is_listed():
    """One row's tokens are all alike, so it gets no compensation token and its place stays empty."""
    model = random_model(SPEC, SPEC.layers, torch.float32)
    bench = Bench(model, LIBRA, Prompt(visual=64, text=10, batch=2))
    bench.embeds[1, 5:69] = bench.embeds[1, 5]
    data = measure(bench, SPEC, pairs=1, progress=False)
    assert data["tokens_per_layer"]["compensation_added_behind"][1] == [1, 0]
    cache = data["cache"]
    assert (
        cache["padding"] > 0
        and cache["compressed"] == cache["schedule"] + cache["compensation"] + cache["padding"]
    )


def test_the_image_lies_between_two_halves_of_the_text():
    model = random_model(SPEC, 2, torch.float32)
    bench = Bench(model, Compression(method="fastv", layers=(0,)), Prompt(visual=6, text=4, batch=2))
    assert bench.places.tolist() == [[False] * 2 + [True] * 6 + [False] * 2] * 2
    known = {tuple(row) for row in model.get_input_embeddings().weight.tolist()}
    assert [[tuple(token) in known for token in row] for row in bench.embeds.tolist()] == (
        ~bench.places
    ).tolist()
    with bench.mode(False):
        plain = bench.prefill()[0].logits
    with bench.mode(True):
        assert not torch.equal(bench.prefill()[0].logits, plain)
    assert torch.equal(model(inputs_embeds=bench.embeds, logits_to_keep=1).logits, plain)


STEPS = [
    {"at": "input", "method": "fastervlm", "ratio": 0.5},
    {"at": 1, "method": "libra", "ratio": 0.5},
]


@pytest.mark.parametrize(
    "compression",
    [
        Compression(method="visionzip", keep=16),
        Compression(method="divprune", keep=16),
        Compression(method="downsample", keep=16),
        Compression(steps=STEPS),
    ],
)
def test_methods_before_the_language_model_are_measured_too(compression):
    """With pictures where they read the tower; the prefill's operations are those of the shorter prompt."""
    model = random_model(SPEC, SPEC.layers, torch.float32, tower={**TOWER, "image_size": 112})
    bench = Bench(model, compression, Prompt(visual=64, text=10))
    data = measure(bench, SPEC, pairs=1, progress=False)
    tokens = [row[0] for row in data["tokens_per_layer"]["measured"]]
    assert tokens == data["tokens_per_layer"]["visual"] and tokens[0] < 64
    assert bench.pictures == (compression.method != "divprune") == ("vision" in data)
    formula = data["flops"]["formula"]["compressed"]
    assert formula == model_flops(SPEC, [10 + n for n in tokens])
    assert 1 <= data["flops"]["counted_over_formula"]["compressed"] < 1.1
    assert data["flops"]["counted_over_formula"]["vanilla"] == 1
    assert data["extra_memory"]["compression"] > 0 and 0 < data["parts"]["share"] < 1


@pytest.mark.slow
@pytest.mark.parametrize("row", ["llava7b_r50", "llava7b_fastv", "next8b_r50"])
def test_true_width_is_within_one_percent_of_the_formula(row):
    row = Row.from_yaml(ROOT / "configs" / f"{row}.yaml")
    spec = get_model(row.model)
    compression = scale_layers(row.compression, spec.layers, 8)
    bench = Bench(random_model(spec, 8, torch.bfloat16), compression, Prompt(visual=576))
    counted = bench.count(True)
    rows = [[64 + n[0] for n in bench.stats["visual_tokens"]]]
    assert 1 <= counted.operations / model_flops(spec, *rows) <= 1.01


EARLY = [
    *("--random-weights", "--config"),
    str(ROOT / "configs" / "mini" / "field" / "c11_visionzip_original.yaml"),
]


def command(*more: str) -> list[str]:
    return [
        "--config",
        str(ROOT / "configs" / "mini" / "r50.yaml"),
        "--dtype",
        "float32",
        "--device",
        "cpu",
        *more,
    ]


def test_command_prints_and_writes(capsys, tmp_path):
    file = tmp_path / "new" / "latency.json"
    options = ["--random-weights", "--layers", "8", "--visual-tokens", "40", "--pairs", "3", "--decode", "1"]
    assert main(command(*options, "--json", str(file))) == 0
    out, data = capsys.readouterr().out, json.loads(file.read_text(encoding="utf-8"))
    assert (
        data["compression"]["layers"] == [1, 3, 5]
        and data["row_layers"] == [2, 5, 8]
        and data["of_layers"] == 12
    )
    assert "8 of 12 layers" in out and "after layers 1, 3, 5 (the row's: 2, 5, 8 of 12)" in out
    assert "visual tokens 40 → 20 → 10 → 5" in out and "75% order-statistic interval" in out
    assert f"{data['prefill']['ratio_over_flops_ratio']:.3f}" in out and "decoding, a token (1)" in out
    assert len(data["prefill"]["pairs"]) == 3 and data["versions"]["torch"] == torch.__version__.split("+")[0]
    assert data["machine"]["threads"] == torch.get_num_threads() and str(ROOT) not in json.dumps(
        data["machine"]
    )
    assert [path.name for path in file.parent.iterdir()] == ["latency.json"]


def test_command_measures_rows_before_the_language_model_and_lists_of_steps(capsys, tmp_path):
    steps = tmp_path / "steps.yaml"
    row = {"model": "mini", "title": "two", "tasks": ["mini_find"], "compression": {"steps": STEPS}}
    steps.write_text(json.dumps(row), encoding="utf-8")
    options = ["--random-weights", "--layers", "4", "--pairs", "1", "--dtype", "float32", "--device", "cpu"]
    assert main([*EARLY, *options]) == 0
    out = capsys.readouterr().out
    assert "visionzip, keep 28, in the vision tower" in out and "visual tokens 256 → 28" in out
    assert "vision, 1 picture(s)" in out
    assert main(["--config", str(steps), *options]) == 0
    assert (
        "compression    fastervlm, then libra, ratio 0.5, then ratio 0.5, before the language model, then"
        in capsys.readouterr().out
    )


def test_command_measures_a_checkpoint(capsys, tmp_path):
    hf_model(6).save_pretrained(tmp_path / "hf")
    options = [
        "--checkpoint",
        str(tmp_path / "hf"),
        "--visual-tokens",
        "20",
        "--pairs",
        "1",
        "--attn",
        "eager",
    ]
    assert main(command(*options, "--compression-layers", "2,4")) == 0
    out = capsys.readouterr().out
    assert "weights of a checkpoint" in out and "after layers 2, 4 (" in out
    assert "counted over formula             1.0000 vanilla" in out


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "--random-weights --checkpoint --true-size is required"),
        (["--random-weights", "--layers", "2"], "have no places of their own in 2 layers"),
        (["--random-weights", "--layers", "0"], "0 is not a whole number from 1 up"),
        (["--random-weights", "--compression-layers", "3,99"], "layers: 99 is out of range"),
        (["--random-weights", "--images", "0"], "none of the 1 rows has a picture"),
        (["--random-weights", "--images", "40"], "64 text tokens do not reach around 40 pictures"),
        (
            ["--random-weights", "--images", "0,1", "--batch", "2", "--compression-layers", "2", "--peer"],
            "FastV knows one picture a row",
        ),
        (
            ["--random-weights", "--grow", "--output", "{folder}/g", "--images", "2"],
            "--images does not go with --grow",
        ),
        (["--random-weights", "--compression-layers", "a"], "a is not a whole number from 0 up"),
        (["--random-weights", "--attn", "nonsense"], "nonsense"),
        (["--random-weights", "--device", "nonsense"], "--device: nonsense is not a device"),
        (["--random-weights", "--json", "{folder}"], "is a folder"),
        (["--checkpoint", "{folder}/none"], "none is not a folder"),
        (["--checkpoint", "{folder}"], "cannot be loaded"),
        (["--checkpoint", "{folder}", "--layers", "3"], "--layers cuts a model of random weights"),
        (
            ["--random-weights", "--config", "{configs}/mini/vanilla.yaml"],
            "vanilla.yaml: this row compresses nothing",
        ),
        (
            ["--random-weights", "--config", "{configs}/table7/qwen2vl7b_fastv.yaml"],
            "give a number with --visual-tokens",
        ),
        (
            ["--random-weights", "--visual-tokens", "20,40"],
            "--visual-tokens takes one number, and a list only with --grow",
        ),
        (["--random-weights", "--batch", "1,x"], "x is not a whole number from 1 up"),
        (
            [
                *("--random-weights", "--vision", "--visual-tokens", "40"),
                *("--config", "{configs}/table7/qwen2vl7b_fastv.yaml"),
            ],
            "the size of qwen2-vl-7b's vision tower is not known here",
        ),
        (
            [*EARLY, "--visual-tokens", "40"],
            "which makes 256 tokens of a picture and not 40; give 256",
        ),
        (
            [*EARLY, "--compression-layers", "2"],
            "--compression-layers: method visionzip compresses in the vision tower, before the model's",
        ),
        (["--random-weights", "--peer"], "FastV prunes at one layer and this compression has 3"),
        (
            ["--random-weights", "--plot", "{folder}/a.pdf"],
            "is not a picture's name; give a file that ends in .png",
        ),
        (["--random-weights", "--grow"], "name a folder with --output"),
        (
            ["--random-weights", "--grow", "--output", "{folder}/g", "--peer"],
            "--peer does not go with --grow",
        ),
        (
            [
                "--random-weights",
                "--grow",
                "--output",
                "{folder}/g",
                "--visual-tokens",
                "20",
                "--max-tokens",
                "9",
            ],
            "--max-tokens",
        ),
        (["--random-weights", "--output", "{folder}/g"], "--output is the folder of --grow"),
        (["--random-weights", "--update"], "--update rewrites the figures of --check"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(arguments, words, capsys, tmp_path):
    arguments = [word.format(folder=tmp_path, configs=ROOT / "configs") for word in arguments]
    with pytest.raises(SystemExit) as stopped:
        main(command(*arguments))
    out, error = capsys.readouterr()
    last = error.splitlines()[-1]
    assert stopped.value.code == 2 and out == "" and last.startswith("error: ") and words in last
    assert not list(tmp_path.iterdir())


def test_a_row_is_needed(capsys):
    with pytest.raises(SystemExit):
        main(["--random-weights"])
    assert capsys.readouterr().err == "error: the argument --config is required\n"


def test_a_model_larger_than_memory_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("libra.latency.command.free_memory", lambda device: 1_000_000)
    with pytest.raises(SystemExit):
        main(command("--random-weights"))
    assert "12 layers take 9.63 MB and 1.00 MB are free; take fewer --layers" in capsys.readouterr().err


TOWER = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=56,
    patch_size=14,
)


def test_a_random_tower_sees_every_patch_in_its_place():
    model = random_model(SPEC, 2, torch.float32, tower=TOWER)
    tower = model.model.vision_tower
    numbers = dict(tower.named_buffers())
    assert (
        all(
            ids.tolist() == [list(range(17))]
            for name, ids in numbers.items()
            if name.endswith("position_ids")
        )
        and numbers
    )
    with torch.inference_mode():
        features = model.get_image_features(pixel_values=torch.zeros(2, 3, 56, 56)).pooler_output
    assert [tuple(rows.shape) for rows in features] == [(16, SPEC.hidden_size)] * 2
    assert features[0].isfinite().all() and torch.equal(features[0], features[1])
    assert len(features[0].unique(dim=0)) == 16  # an empty picture's patches differ by their place alone


def test_pictures_of_a_prompt():
    config = CLIPVisionConfig(**CLIP_L_336)
    for name, visual, views in (
        ("llava-1.5-7b", 576, 1),
        ("llava-1.5-7b", 2880, 5),
        ("llava-1.5-7b", 577, 2),
        ("llava-next-8b", 2267, 5),
        ("llava-next-8b", 576, 1),
    ):
        assert views_of(get_model(name), config, visual) == views
    assert tower_of(get_model("llava-next-8b")) is CLIP_L_336
    with pytest.raises(ConfigError, match="qwen2-vl-7b"):
        tower_of(get_model("qwen2-vl-7b"))


def test_command_times_the_vision_tower_too(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(TOWERS, "mini", TOWER)
    file, picture = tmp_path / "a.json", tmp_path / "a.png"
    options = [
        "--random-weights",
        "--layers",
        "4",
        "--visual-tokens",
        "40",
        "--pairs",
        "2",
        "--batch",
        "2",
        "--vision",
    ]
    assert main(command(*options, "--json", str(file), "--plot", str(picture), "--decode", "1")) == 0
    out, data = capsys.readouterr().out, json.loads(file.read_text(encoding="utf-8"))
    assert data["vision"]["views"] == 2 * 3 and "vision, 6 picture(s)" in out and "time to first token" in out
    rows = out.split("KV cache")[0]  # one table
    assert all(name in rows for name in ("the selection in it", "plain layers", "decoding, a token"))
    for mode in ("vanilla", "compressed"):
        parts = data["vision"][f"{mode}_seconds"], data["prefill"][f"{mode}_seconds"]
        assert min(parts) > 0 and sum(parts) == pytest.approx(
            data["vision_and_prefill"][f"{mode}_seconds"], rel=1e-9
        )
    assert Image.open(picture).format == "PNG" and {path.name for path in tmp_path.iterdir()} == {
        "a.json",
        "a.png",
    }


def test_a_checkpoint_brings_its_own_tower(capsys, tmp_path):
    hf_model(4).save_pretrained(tmp_path / "hf")
    options = [
        "--checkpoint",
        str(tmp_path / "hf"),
        "--visual-tokens",
        "20",
        "--pairs",
        "1",
        "--compression-layers",
        "1",
    ]
    assert main(command(*options, "--vision")) == 0
    assert "vision, 2 picture(s)" in capsys.readouterr().out


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert (
        stopped.value.code == 0
        and "python -m libra.latency --config configs/llava7b_r50.yaml" in capsys.readouterr().out
    )


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_text(file, "old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError):
        write_text(file, "new")
    assert file.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_rows_with_none_one_and_two_pictures():
    prompt = Prompt(visual=24, text=8, batch=4, images=(0, 1, 2))
    assert prompt.pictures == [0, 1, 2, 0] and prompt.length == 56
    assert prompt.mask().sum(1).tolist() == [8, 32, 56, 8] and prompt.places().sum(1).tolist() == [
        0,
        24,
        48,
        0,
    ]
    assert not (prompt.places() & (prompt.mask() == 0)).any() and not prompt.places()[:, -1].any()
    runs = (prompt.places()[2].int().diff() == 1).sum()
    assert runs == 2  # two pictures, not one long one
    assert Prompt(24, batch=2, images=(2,)).mask() is None

    bench = Bench(random_model(SPEC, SPEC.layers, torch.float32), LIBRA, prompt)
    found = measure(bench, SPEC, pairs=1, steps=1, progress=False)
    tokens = [[n, n, n // 2, n // 2, n // 4] for n in (0, 24, 48, 0)]  # after layers 1 and 3 of 5
    assert found["tokens_per_layer"]["measured"] == [list(layer) for layer in zip(*tokens)]
    rows = [[row[0]] * 5 for row in tokens], tokens
    whole, short = (sum(model_flops(SPEC, [8 + n for n in row]) for row in kind) for kind in rows)
    assert found["flops"]["formula"] == {"vanilla": whole, "compressed": short, "ratio": short / whole}
    padding = found["cache"]["padding_share"]
    assert padding["vanilla"] == pytest.approx(1 - (8 + 32 + 56 + 8) / (4 * 56))
    cache = found["cache"]
    assert cache["compressed"] == cache["schedule"] + cache["compensation"] + cache["padding"]
    assert 0 < padding["compressed"] == cache["padding"] / cache["compressed"] < padding["vanilla"]
