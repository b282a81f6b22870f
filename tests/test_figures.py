"""What the figures show of a trace, its file, and the command from a model folder to a picture."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import families
import odd_files
import pytest
import torch
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_hex
from PIL import Image
from transformers import CLIPConfig

import libra
from libra import figures
from libra.engine.trace import COMPENSATION, DROPPED, GONE, MERGED, TARGET, Recorder, RowTrace
from libra.figures import drawing, prefill
from libra.figures.drawing import Block, Canvas, Record
from llava.convert import convert

ROOT = Path(__file__).resolve().parents[1]
LIBRA = libra.Compression(method="libra", layers=(2, 5), ratio=0.5, tau=0.2)


def traced(c: libra.Compression, spans: list[int], seed: int = 0) -> RowTrace:
    """Random tokens through every layer of a compression."""
    draw, recorder = torch.Generator().manual_seed(seed), Recorder()
    hidden, alpha = torch.randn(1, sum(spans), 6, generator=draw), torch.rand(1, sum(spans), generator=draw)
    for layer in c.layers:
        step = libra.compress(hidden, alpha, c, spans=[spans])
        recorder.add(layer, step, [spans])
        targets = step.targets.shape[1]
        hidden, spans = step.tokens[:, :targets], list(step.layout.keeps[0])
        alpha = torch.rand(1, targets, generator=draw)
    return recorder.rows()[0]


@pytest.fixture(scope="module")
def trace() -> RowTrace:
    made = traced(LIBRA, [24, 12])
    fates = torch.cat([stage.fate for stage in made.stages]).tolist()
    assert {GONE, TARGET, MERGED, COMPENSATION} == set(fates)  # everything that a figure of libra can show
    return made


def picture(width: int = 24, height: int = 16) -> Image.Image:
    return Image.linear_gradient("L").resize((width, height)).convert("RGB")


def cells(panel, color: str) -> set[tuple[float, float]]:
    """Upper left corners of the cells painted in a colour."""
    found = set()
    for collection in panel.collections:
        faces = collection.get_facecolor()
        if (
            isinstance(collection, PolyCollection)
            and len(faces)
            and to_hex(faces[0]).lower() == color.lower()
        ):
            found |= {tuple(path.vertices[0]) for path in collection.get_paths()}
    return found


def framed(panel) -> set[tuple[float, float]]:
    frame = [c for c in panel.collections if isinstance(c, PolyCollection) and not len(c.get_facecolor())]
    assert len(frame) == 1
    return {tuple(path.vertices[0]) for path in frame[0].get_paths()}


def lines(panel, color: str) -> set[tuple]:
    found = [
        c
        for c in panel.collections
        if isinstance(c, LineCollection) and to_hex(c.get_color()[0]) == color.lower()
    ]
    return {tuple(map(tuple, segment.tolist())) for c in found for segment in c.get_segments()}


def places(which: torch.Tensor, canvas: Canvas) -> set[tuple[float, float]]:
    return {tuple(map(float, corner)) for corner in canvas.corners[which].tolist()}


# What is seen of a trace.


def test_every_interval_has_one_target_and_is_a_run(trace):
    for number, stage in enumerate(trace.stages):
        runs = drawing.intervals(trace, number)
        assert runs[stage.fate == TARGET].tolist() == list(range(len(trace.kept(number))))
        assert bool((runs.diff() >= 0).all()) and not set(runs[:24].tolist()) & set(runs[24:].tolist())


def test_intervals_are_those_of_the_selector():
    c = libra.Compression(method="libra", layers=(2,), ratio=2 / 3)
    # ⌊i·10/3⌋: the intervals begin at 0, 3 and 6
    assert drawing.intervals(traced(c, [10]), 0).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]


def test_fastv_is_what_fastv_would_have_kept(trace):
    """Of the first layer exactly its own choice on the same tokens; later as many as there are, still of the
    first layer."""
    same = traced(libra.Compression(method="fastv", layers=(2,), ratio=0.5), [24, 12])
    assert same.stages[0].importance.equal(trace.stages[0].importance)
    assert drawing.fastv(trace, 0).nonzero().flatten().tolist() == same.kept(0)
    later = drawing.fastv(trace, 1)
    assert later[:24].sum() == 6 and later[24:].sum() == 3
    assert (
        trace.stages[0].importance[:24][later[:24]].min() > trace.stages[0].importance[:24][~later[:24]].max()
    )


def test_groups_join_members_and_their_target(trace):
    for stage in trace.stages:
        number = drawing.groups(stage)
        merged = stage.fate == MERGED
        assert merged.any() and number[merged].equal(number[stage.slot[merged]])
        alone = (stage.fate == TARGET) & ~torch.isin(torch.arange(36), stage.slot[merged])
        assert bool((number[alone | (stage.fate == COMPENSATION) | (stage.fate == GONE)] == -1).all())


def test_blocks_stand_in_lines_with_newlines_beside():
    canvas = Canvas([Block(4, 2), Block(9, 2, newline=True), Block(3, 2)])
    assert canvas.places == [(0, 0), (3, 0), (0, 4)] and (canvas.width, canvas.height) == (6, 6)
    assert canvas.corners.tolist() == [
        [0, 0],
        [1, 0],
        [0, 1],
        [1, 1],
        [3, 0],
        [4, 0],
        [5, 0],
        [3, 1],
        [4, 1],
        [5, 1],
        [3, 2],
        [4, 2],
        [5, 2],
        [0, 4],
        [1, 4],
        [0, 5],
    ]


def test_borders_lie_between_labels_and_around():
    edges = {
        tuple(map(tuple, edge)) for edge in Canvas([Block(4, 2)]).borders(torch.tensor([0, 0, 1, 2])).tolist()
    }
    around = {
        ((0, 0), (0, 1)),
        ((0, 1), (0, 2)),
        ((2, 0), (2, 1)),
        ((2, 1), (2, 2)),
        ((0, 0), (1, 0)),
        ((1, 0), (2, 0)),
        ((0, 2), (1, 2)),
        ((1, 2), (2, 2)),
    }
    assert edges == around | {((0, 1), (1, 1)), ((1, 1), (2, 1)), ((1, 1), (1, 2))}


# The figure.


@pytest.fixture(scope="module")
def figure(trace):
    return drawing.draw(Record(trace, LIBRA, (Block(24, 6, picture()), Block(12, 4))))


def test_cells_have_the_colours_of_their_fates(trace, figure):
    canvas = Canvas([Block(24, 6), Block(12, 4)])
    panels = figure.axes
    assert len(panels) == 8
    for number, stage in enumerate(trace.stages):
        fastv, heat, targets, merging = panels[4 * number : 4 * number + 4]
        choice = drawing.fastv(trace, number)
        assert framed(fastv) == places(choice, canvas)
        assert cells(fastv, drawing.VEIL_COLOR) == places(~choice, canvas)
        for panel in (targets, merging):
            assert framed(panel) == places(stage.fate == TARGET, canvas)
            assert cells(panel, drawing.VEIL_COLOR) == places(stage.fate > TARGET, canvas)
            assert cells(panel, drawing.GONE_COLOR) == places(stage.fate == GONE, canvas)
        assert cells(merging, drawing.COMPENSATION_COLOR) == places(stage.fate == COMPENSATION, canvas)
        groups = drawing.groups(stage)
        for k, color in enumerate(drawing.GROUP_COLORS):
            assert cells(merging, color) == places(
                (groups >= 0) & (groups % len(drawing.GROUP_COLORS) == k), canvas
            )


def test_importance_is_a_heat_map_of_ranks(trace, figure):
    """The brightest cell is the most important token, and tokens that are gone have no colour of the map."""
    canvas = Canvas([Block(24, 6), Block(12, 4)])
    for number, stage in enumerate(trace.stages):
        heat = figure.axes[4 * number + 1]
        assert heat.get_title() == f"layer {stage.layer}: importance\nby rank, dark to bright"
        known = stage.importance.isfinite()
        gone, warm = heat.collections[-2:]
        assert (len(gone.get_paths()), len(warm.get_paths())) == (int((~known).sum()), int(known.sum()))
        brightness = warm.get_facecolors()[:, :3].sum(1)
        corner = warm.get_paths()[int(brightness.argmax())].vertices[0].tolist()
        assert corner == canvas.corners[int(stage.importance.nan_to_num(-1).argmax())].tolist()
        assert brightness.argmin() == stage.importance[known].argmin()


def test_lines_are_interval_borders_and_ways_to_targets(trace, figure):
    canvas = Canvas([Block(24, 6), Block(12, 4)])
    for number, stage in enumerate(trace.stages):
        _, _, targets, merging = figure.axes[4 * number : 4 * number + 4]
        borders = canvas.borders(drawing.intervals(trace, number)).float().tolist()
        assert lines(targets, drawing.BORDER_COLOR) == {tuple(map(tuple, edge)) for edge in borders}
        middle = (canvas.corners + 0.5).tolist()
        ways = {
            (tuple(middle[i]), tuple(middle[stage.slot[i]]))
            for i in (stage.fate == MERGED).nonzero().flatten()
        }
        assert lines(merging, "#000000") == ways


def test_titles_tell_layer_tokens_and_share(trace, figure):
    titles = [panel.get_title() for panel in figure.axes]
    assert (
        figure.get_suptitle()
        == "libra: select intervals, merge igm, ratio 0.5 after layers 2, 5; 36 visual tokens"
    )
    assert titles[0] == "FastV: top-k by the importance at layer 2\n18 of 36 tokens kept (50%)"
    assert titles[4] == "FastV: top-k by the importance at layer 2\n9 of 36 tokens kept (25%)"
    assert titles[6] == "layer 5: the best of each interval\n9 of 36 tokens kept (25%)"
    merged, rest = (int((trace.stages[1].fate == fate).sum()) for fate in (MERGED, COMPENSATION))
    assert merged + rest == 9
    assert (
        titles[7]
        == f"layer 5: the other 9 of 18 tokens:\n{merged} merged, {rest} into the compensation token"
    )


def test_pictures_lie_under_their_tokens_and_numbers_beside_the_others(figure):
    for panel in figure.axes:
        (image,) = panel.images
        assert image.get_extent() == [0, 6, 4, 0]
        assert [(text.get_text(), text.get_position()) for text in panel.texts] == [
            ("24", (6.6, 0.5)),
            ("28", (6.6, 1.5)),
            ("32", (6.6, 2.5)),
        ]
        assert panel.get_xlim() == (-0.3, 11.3) and panel.get_ylim() == (4.3, -0.3)


def test_a_method_that_drops_has_no_merging_and_no_intervals():
    c = libra.Compression(method="fastv", layers=(2,), ratio=0.5)
    made = traced(c, [70])
    assert set(made.stages[0].fate.tolist()) == {TARGET, DROPPED}
    figure = drawing.draw(Record(made, c))
    fastv, _, own = figure.axes
    assert framed(fastv) == framed(own) and not lines(own, drawing.BORDER_COLOR)
    assert own.get_title() == "layer 2: select topk\n35 of 70 tokens kept (50%)"
    assert [text.get_text() for text in own.texts] == ["0", "32", "64"]  # a strip, as no places were given
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["kept: a target", "not kept"]


def test_blocks_must_hold_the_traced_tokens(trace):
    with pytest.raises(ValueError, match="the blocks hold 35 tokens and the trace 36"):
        Record(trace, LIBRA, (Block(35, 7),))
    with pytest.raises(ValueError, match="nothing to draw"):
        Record(RowTrace((), ()), LIBRA)


# The file.


def test_a_trace_file_gives_back_an_equal_record(trace, tmp_path):
    made = Record(trace, LIBRA, (Block(24, 6, picture()), Block(12, 3, newline=True)))
    made.save(tmp_path / "trace.json")
    json.loads((tmp_path / "trace.json").read_text(), parse_constant=pytest.fail)  # no NaN, which is no JSON
    again = Record.load(tmp_path / "trace.json")
    assert again.compression == LIBRA and again.trace.spans == trace.spans
    assert [(b.tokens, b.columns, b.newline) for b in again.blocks] == [(24, 6, False), (12, 3, True)]
    assert again.blocks[0].picture.tobytes() == picture().tobytes() and again.blocks[1].picture is None
    for one, other in zip(again.trace.stages, trace.stages, strict=True):
        assert one.layer == other.layer
        for name in ("fate", "slot", "weight", "importance", "similarity"):
            value = getattr(other, name)
            assert getattr(one, name).dtype == value.dtype
            torch.testing.assert_close(getattr(one, name), value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda data: data.pop("trace"), "'trace' is missing"),
        (lambda data: data["trace"]["stages"][0].pop("slot"), "not a trace: 'slot' is missing"),
        (
            lambda data: data["trace"]["stages"][0]["fate"].pop(),
            "layer 2 has not one fate for each of 36 tokens",
        ),
        (
            lambda data: data["trace"]["stages"][0]["fate"].__setitem__(0, 5),
            "fates or slots that do not exist",
        ),
        (
            lambda data: data["trace"]["stages"][0]["slot"].__setitem__(0, 36),
            "fates or slots that do not exist",
        ),
        (
            lambda data: data["trace"]["stages"][0].update(fate=[MERGED] * 36),
            "merges tokens into one that is not a target",
        ),
        (lambda data: data["trace"]["stages"][0].update(fate=[GONE] * 36), "a span without a target"),
        (
            lambda data: data["trace"]["stages"][0].update(fate=["target"] * 36),
            "not a trace: too many dimensions",
        ),
        (lambda data: data["compression"].update(merge="glue"), "merge: glue is unknown"),
        (lambda data: data["blocks"][0].update(columns=0), "a block needs tokens and columns"),
        (lambda data: data["blocks"][0].update(picture="AAAA"), "the image in it is in no known format"),
        (lambda data: data["blocks"].pop(), "the blocks hold 24 tokens"),
        (lambda data: data["blocks"][0].update(newline="no"), "newline: no is neither true nor false"),
    ],
)
def test_a_damaged_trace_file_is_refused_by_name(trace, tmp_path, capsys, change, sentence):
    path, output = tmp_path / "trace.json", tmp_path / "figure.png"
    Record(trace, LIBRA).save(path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    error = refused(capsys, "--from-trace", path, "--output", output)
    assert error.startswith(f"error: {path} is not a trace file of --save-trace") and sentence in error
    assert not output.exists()


def test_a_trace_file_nested_too_deeply_is_refused_by_name(tmp_path, capsys):
    (tmp_path / "trace.json").write_text("[" * 200_000)
    error = refused(capsys, "--from-trace", tmp_path / "trace.json", "--output", tmp_path / "figure.png")
    assert error.startswith(f"error: {tmp_path / 'trace.json'} is not a trace file of --save-trace")


# Where a processor puts the tokens of an image.

PROCESSOR = SimpleNamespace(
    image_processor=SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.25] * 3, merge_size=2)
)


@pytest.mark.parametrize(
    "family, shapes",
    [
        ("LlavaForConditionalGeneration", [(4, 4)]),
        ("LlavaNextForConditionalGeneration", [(4, 4), (4, 8)]),
        ("LlavaOnevisionForConditionalGeneration", [(4, 4), (4, 4)]),
        ("VideoLlavaForConditionalGeneration", [(4, 4)]),
        ("InternVLForConditionalGeneration", [(4, 4)]),
        ("Qwen2VLForConditionalGeneration", [(4, 6)]),
        ("Qwen3VLForConditionalGeneration", [(4, 6)]),
    ],
)
def test_the_places_of_each_family(family, shapes):
    """As many rows and columns as the family's own tokens of an image need."""
    sample = families.talk(family, "t4 i t5", 3)
    inputs = families.collate(family, [sample])
    blocks = figures.blocks_of(
        inputs, picture(), [int(sample.visual.sum())], PROCESSOR, families.model(family).config
    )
    assert [(block.rows, block.columns) for block in blocks] == shapes
    assert all(block.picture is not None for block in blocks)
    assert [block.newline for block in blocks] == [False, True][: len(blocks)]


def test_several_squares_are_tiles_and_unknown_counts_strips():
    pixels = torch.zeros(3, 3, 28, 28)
    pixels[1] = 2.0
    tiles = figures.blocks_of({"pixel_values": pixels}, picture(), [48], PROCESSOR, None)
    assert [(tile.tokens, tile.columns) for tile in tiles] == [(16, 4)] * 3
    assert tiles[0].picture.getpixel((0, 0)) == (128, 128, 128) and tiles[1].picture.getpixel((9, 9)) == (
        255,
        255,
        255,
    )
    for inputs in ({"pixel_values": pixels}, {"pixel_values": torch.zeros(1, 3, 28, 42)}, {}):
        strips = figures.blocks_of(inputs, picture(), [17, 30], PROCESSOR, None)
        assert [(b.tokens, b.columns, b.picture) for b in strips] == [(17, 17, None), (30, 30, None)]


# The command.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The embedded model as a stock Hugging Face folder."""
    folder = tmp_path_factory.mktemp("models") / "mini-hf"
    convert(str(ROOT / "mini/checkpoint"), str(folder))
    return folder


@pytest.fixture
def scene(tmp_path) -> Path:
    picture(96, 96).save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


def arguments(model, image, output, config=ROOT / "configs/mini/r50.yaml") -> list:
    prompt = "how many digits are there ?"
    return ["--model", model, "--image", image, "--prompt", prompt, "--config", config, "--output", output]


def refused(capsys, *args) -> str:
    with pytest.raises(SystemExit) as stop:
        figures.main([str(arg) for arg in args])
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_from_a_model_to_a_figure_and_again_from_its_trace(checkpoint, scene, tmp_path, capsys):
    output, saved = tmp_path / "new folder" / "tokens.png", tmp_path / "trace.json"
    assert (
        figures.main(
            [str(a) for a in [*arguments(checkpoint, scene, output), "--save-trace", saved, "--dpi", 60]]
        )
        == 0
    )
    record = Record.load(saved)
    assert record.compression == libra.Compression.from_yaml(ROOT / "configs/mini/r50.yaml")
    assert [len(record.trace.kept(i)) for i in range(3)] == [128, 64, 32]
    (block,) = record.blocks
    assert (block.tokens, block.columns) == (256, 16)
    seen = torch.tensor(list(block.picture.tobytes())) - torch.tensor(list(picture(96, 96).tobytes()))
    assert seen.abs().max() <= 1  # what the model saw is the scene, up to half precision
    assert (
        figures.main(["--from-trace", str(saved), "--output", str(tmp_path / "again.png"), "--dpi", "60"])
        == 0
    )
    first, again = Image.open(output).convert("RGB"), Image.open(tmp_path / "again.png").convert("RGB")
    assert first.size == again.size and first.tobytes() == again.tobytes()
    capsys.readouterr()
    assert figures.main(["--from-trace", str(saved), "--output", str(tmp_path / "tokens.svg")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'tokens.svg'}: written\n"
    assert "<svg" in (tmp_path / "tokens.svg").read_text()[:600]
    assert {path.name for path in tmp_path.iterdir()} == {
        "new folder",
        "scene.png",
        "trace.json",
        "again.png",
        "tokens.svg",
    }


@pytest.mark.parametrize(
    "compression, wanted",
    [
        (
            {"method": "visionzip", "keep": 64},
            [["tower: select visionzip\n64 of 256", "tower: the other 192 of 256 tokens:"]],
        ),
        (
            {"method": "fastervlm", "keep": 64},
            [
                [
                    "FastV: top-k by the score of the tower, input",
                    "input: score",
                    "input: select topk\n64 of 256",
                ]
            ],
        ),
        ({"method": "downsample", "keep": 64}, [["tower: select downsample\n64 of 256"]]),
        (
            {"steps": [{"method": "divprune", "keep": 128}, {"at": 3, "method": "libra", "ratio": 0.5}]},
            [
                ["input: select divprune\n128 of 256", "input: the other 128 of 256 tokens:\n128 dropped"],
                ["layer 3: the best of each interval\n64 of 256", "layer 3: the other 64 of 128 tokens:"],
            ],
        ),
    ],
)
def test_methods_before_the_language_model_and_lists_of_steps(
    compression, wanted, checkpoint, scene, tmp_path
):
    """What each kept, and its panels: FastV's choice only where tokens have a score."""
    config, saved = tmp_path / "c.yaml", tmp_path / "trace.json"
    config.write_text(json.dumps(compression), encoding="utf-8")
    given = arguments(checkpoint, scene, tmp_path / "figure.png")
    given[given.index("--config") + 1] = config
    assert figures.main([str(part) for part in [*given, "--save-trace", saved, "--dpi", 30]]) == 0
    record = Record.load(saved)
    figure = drawing.draw(record)
    titles = [panel.get_title() for panel in figure.axes]
    for row, expected in zip(range(len(wanted)), wanted, strict=True):
        width = len(figure.axes) // len(wanted)
        of_row = titles[row * width : (row + 1) * width]
        assert len(of_row) == len(expected)
        assert all(title.startswith(begin) for title, begin in zip(of_row, expected))


def test_b8_a_figure_opens_pictures_as_the_commands_do(checkpoint, tmp_path):
    """One that its EXIF turns gives the trace and the picture of the same one, upright."""
    path, pixels = odd_files.write(tmp_path)["turned.png"]
    Image.fromarray(pixels).save(tmp_path / "upright.png")
    records = []
    for image in (path, tmp_path / "upright.png"):
        saved = tmp_path / "trace.json"
        argv = [*arguments(checkpoint, image, tmp_path / "figure.png"), "--save-trace", saved, "--dpi", 30]
        assert figures.main([str(part) for part in argv]) == 0
        records.append(saved.read_bytes())
    assert records[0] == records[1]


def test_a_model_without_a_chat_template_gets_the_image_before_the_prompt(checkpoint, scene):
    model, processor = prefill.load(str(checkpoint))
    c, image = libra.Compression.from_yaml(ROOT / "configs/mini/r50.yaml"), Image.open(scene)
    with_template = figures.trace_image(model, processor, c, image, "how many ?")
    processor.chat_template = None
    for prompt in ("USER: <image>\nhow many ? ASSISTANT:", "how many ?"):
        record = figures.trace_image(model, processor, c, image, prompt)
        same = [
            one.fate.equal(other.fate) for one, other in zip(record.trace.stages, with_template.trace.stages)
        ]
        assert all(same) == ("ASSISTANT" in prompt) and record.trace.spans == (256,)


def test_what_cannot_be_drawn_is_one_sentence(checkpoint, scene, tmp_path, capsys, monkeypatch):
    output = tmp_path / "tokens.png"
    given = arguments(checkpoint, scene, output)
    assert "--model, --prompt missing" in refused(
        capsys, "--image", scene, "--config", "x", "--output", output
    )
    assert "must end in .png, .svg, .pdf" in refused(capsys, *given[:-1], "tokens.gif")
    assert "--dpi: 0" in refused(capsys, *given, "--dpi", 0)
    assert "leave out --model" in refused(capsys, "--from-trace", "x", *given)
    assert "leave out --save-trace" in refused(
        capsys, "--from-trace", "x", "--save-trace", "y", "--output", output
    )
    assert "none.json cannot be read" in refused(
        capsys, "--from-trace", tmp_path / "none.json", "--output", output
    )
    assert "none.png cannot be opened (No such file" in refused(
        capsys, *arguments(checkpoint, tmp_path / "none.png", output)
    )
    text = tmp_path / "text.png"
    text.write_text("no picture")
    assert "text.png is in no known format" in refused(capsys, *arguments(checkpoint, text, output))
    vanilla = ROOT / "configs/mini/vanilla.yaml"
    assert "vanilla.yaml compresses nothing" in refused(
        capsys, *arguments(checkpoint, scene, output, vanilla)
    )
    too_deep = tmp_path / "deep.yaml"
    too_deep.write_text("method: libra\nlayers: [40]\n")
    assert "layers: 40 is out of range" in refused(capsys, *arguments(checkpoint, scene, output, too_deep))
    nothing, original = tmp_path / "nothing", ROOT / "mini/checkpoint"
    assert f"there is no folder {nothing}" in refused(capsys, *arguments(nothing, scene, output))
    assert f"the model {original} cannot be loaded: it is in LLaVA's own format; convert it with" in refused(
        capsys, *arguments(original, scene, output)
    )
    monkeypatch.setattr(prefill, "load", lambda path: (torch.nn.Linear(1, 1), None))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert refused(capsys, *given) == "error: drawing needs matplotlib; pip install matplotlib"
    assert not output.exists()


def test_an_unsupported_model_is_refused_by_name(scene, tmp_path, capsys, monkeypatch):
    class OtherForConditionalGeneration(torch.nn.Linear):
        device, dtype, config = torch.device("cpu"), torch.float32, CLIPConfig()

    class Inputs(dict):
        def to(self, *_):
            return self

    processor = SimpleNamespace(
        image_token="<image>", chat_template="{}", apply_chat_template=lambda *_, **__: Inputs()
    )
    monkeypatch.setattr(prefill, "load", lambda path: (OtherForConditionalGeneration(1, 1), processor))
    error = refused(capsys, *arguments("other", scene, tmp_path / "tokens.png"))
    assert "does not support OtherForConditionalGeneration: its configuration names no placeholder" in error
