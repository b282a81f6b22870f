"""VideoLLaMA-2: frames, connector, prompts and the Mistral decoder, against the original's answers and
transformers."""

import builtins
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_llava_next import CLOSE, replay
from transformers import AutoTokenizer, CLIPImageProcessor, MistralConfig, MistralForCausalLM

from libra import Compression
from llava import video
from llava.model import Videollama2MistralConfig, Videollama2MistralForCausalLM
from llava.model.builder import load_pretrained_model
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.multimodal_projector.stc_connector import PADDING, STCConnector

GOLDEN = Path(__file__).parent / "golden" / "videollama2"
TOKENIZERS = {
    "sp320_legacyFalse": GOLDEN / "checkpoint",
    "sp700_legacyFalse": GOLDEN.parent / "text_and_image_processing" / "tokenizers" / "sp700_legacyFalse",
}
LIBRA = Compression(method="libra", layers=(1, 3, 5), ratio=0.5, tau=0.3)
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def data():
    with np.load(GOLDEN / "data.npz") as data:
        return {key: torch.from_numpy(data[key]) for key in data}


@pytest.fixture(scope="module")
def loaded():
    folder = str(GOLDEN / "checkpoint")
    tokenizer, model, processor, length = load_pretrained_model(folder, None, "VideoLLaMA2-7B", device="cpu")
    for name, value in load_file(GOLDEN / "checkpoint" / "model.safetensors").items():
        own = name.replace("vision_tower.vision_model.", "vision_tower.")
        assert torch.equal(model.state_dict()[own], value), name
    tokenizer.chat_template = TEMPLATE
    return tokenizer, model, processor, length


@pytest.fixture
def model(loaded):
    yield loaded[1]
    loaded[1].set_compression(None)


@pytest.fixture
def batch(data):
    """A video with its question, and a text-only row whose video is taken off the list without being
    shown."""
    ids, frames = data["a_video8.input_ids"], data["a_video8.data0"]
    text = torch.cat([ids[:, :6], ids.new_zeros(1, ids.shape[1] - 6)], 1)
    mask = torch.ones_like(ids)
    return {
        "input_ids": torch.cat([ids, text]),
        "attention_mask": torch.cat([mask, mask * (torch.arange(ids.shape[1]) < 6)]),
        "images": [(frames, "video"), (torch.zeros_like(frames), "video")],
    }


def shown(data):
    return {"input_ids": data["a_video8.input_ids"], "images": [(data["a_video8.data0"], "video")]}


def asked(data, case: str) -> dict:
    """The model's arguments of a golden case; of the batch, the text-only row's video is zeros that nobody
    sees."""
    images = [(data[f"{case}.data0"], "image" if case == "c_image" else "video")]
    if case == "d_batch":
        images.append((torch.zeros_like(images[0][0]), "video"))
    return {
        "input_ids": data[f"{case}.input_ids"],
        "attention_mask": data[f"{case}.attention_mask"],
        "images": images,
    }


@pytest.mark.parametrize("case", ["a_video8", "b_video16", "c_image", "d_batch"])
@torch.no_grad()
def test_visual_tokens_and_embeddings(model, data, case):
    given, labels = asked(data, case), data.get(f"{case}.labels")
    features = model.image_features(given["images"])
    for part, want in zip(features, data[f"{case}.projector_features"], strict=True):
        torch.testing.assert_close(part, want, **CLOSE)
    if case == "a_video8":
        torch.testing.assert_close(
            model.get_vision_tower()(given["images"][0][0]), data["a_video8.vision_features"], **CLOSE
        )
    if case != "b_video16":
        spliced = model.splice(given["input_ids"], given["attention_mask"], labels, given["images"])
        torch.testing.assert_close(spliced.embeds, data[f"{case}.prep.inputs_embeds"], **CLOSE)
        assert (
            torch.equal(spliced.mask, data[f"{case}.prep.attention_mask"].bool())
            and int(spliced.visual.sum()) == 45
        )
        assert labels is None or torch.equal(spliced.labels, data[f"{case}.prep.labels"])


@pytest.mark.parametrize("case", ["a_video8", "b_video16", "c_image", "d_batch"])
@torch.no_grad()
def test_logits_loss_and_greedy_ids(model, data, case):
    given, labels = asked(data, case), data.get(f"{case}.labels")
    out = model(**given, labels=labels)
    if f"{case}.logits" in data:
        valid = data[f"{case}.prep.attention_mask"].bool()
        torch.testing.assert_close(out.logits[valid], data[f"{case}.logits"][valid], **CLOSE)
        torch.testing.assert_close(out.loss, data[f"{case}.loss"], **CLOSE)
    else:
        torch.testing.assert_close(out.logits[:, -16:], data[f"{case}.logits_last16"], **CLOSE)
    if f"{case}.generated" in data:
        new = model.generate(
            **given, do_sample=False, max_new_tokens=16, return_dict_in_generate=True, output_logits=True
        )
        assert torch.equal(new.sequences, data[f"{case}.generated"])
        if case == "a_video8":
            torch.testing.assert_close(torch.stack(new.logits, 1), data["a_video8.generate_scores"], **CLOSE)


@torch.no_grad()
def test_connector_alone(model, data):
    connector, seen = model.get_model().mm_projector, []
    hook = connector.sampler.register_forward_hook(lambda _, given, out: seen.append(out))
    torch.testing.assert_close(connector(data["proj.in"]), data["proj.out"], **CLOSE)
    hook.remove()
    torch.testing.assert_close(seen[0], data["proj.sampler"], **CLOSE)


@torch.no_grad()
def test_connector_without_padding(data):
    """With a border of zeros put around its sampler's input by hand, it is the connector with padding."""
    torch.manual_seed(0)
    padded, bare = (
        STCConnector(32, 64, padding) for padding in (PADDING["stc_connector"], PADDING["stc_connector_v35"])
    )
    bare.load_state_dict(padded.state_dict())
    bare.sampler.register_forward_pre_hook(lambda _, given: torch.nn.functional.pad(given[0], (1,) * 6))
    torch.testing.assert_close(bare(data["proj.in"]), padded(data["proj.in"]), **CLOSE)


@torch.no_grad()
def test_token_counts():
    """At every size of the original's table, with a narrow connector."""
    connectors = {kind: STCConnector(4, 4, padding, depth=1) for kind, padding in PADDING.items()}
    counts = json.loads((GOLDEN / "token_counts.json").read_text())
    assert len(counts) == 40
    for key, want in counts.items():
        kind, size, frames = key.split("|")
        side, frames = int(size.split("side ")[1].rstrip(")")), int(frames.split()[0])
        features = torch.zeros(1, frames, side**2, 4)
        if isinstance(want, int):
            assert connectors[kind](features).shape == (1, want, 4), key
        else:
            with pytest.raises(ValueError, match="at least two frames"):
                connectors[kind](features)


@torch.no_grad()
def test_decoder_is_transformers_mistral(model, data):
    """Without compression, on the same embeddings; the RoPE base comes from the original's configuration."""
    stock = MistralForCausalLM(
        MistralConfig(
            **{
                k: v
                for k, v in model.config.to_dict().items()
                if k not in ("model_type", "architectures", "transformers_version")
            }
        )
    ).eval()
    weights = model.state_dict()
    stock.load_state_dict({name: weights[name] for name in stock.state_dict()})
    spliced = model.splice(**shown(data))
    got = model(**shown(data)).logits
    torch.testing.assert_close(got, stock(inputs_embeds=spliced.embeds).logits, **CLOSE)
    new = model.generate(**shown(data), do_sample=False, max_new_tokens=8)
    assert torch.equal(new, stock.generate(inputs_embeds=spliced.embeds, do_sample=False, max_new_tokens=8))
    assert model.model.rotary_emb.inv_freq[1].item() == pytest.approx(1e6 ** (-2 / 16))


@pytest.mark.parametrize(
    "compression", [LIBRA, Compression(method="fastv", layers=(2,), ratio=0.75)], ids=["libra", "fastv"]
)
@torch.no_grad()
def test_compressed(model, data, batch, compression):
    """Tokens a layer, a batch as each row alone, and cached decoding as a replay."""
    model.set_compression(compression)
    batched = model.generate(**batch, do_sample=False, max_new_tokens=6)
    counts = [row for row, _ in model.compression_stats["visual_tokens"]]
    assert counts == (
        [45, 45, 22, 22, 11, 11, 6, 6] if compression is LIBRA else [45, 45, 45, 11, 11, 11, 11, 11]
    )
    assert all(text == 0 for _, text in model.compression_stats["visual_tokens"])
    for b, mask in enumerate(batch["attention_mask"].bool()):
        row = {"inputs": batch["input_ids"][b : b + 1, mask], "images": batch["images"][b : b + 1]}
        single = model.generate(**row, do_sample=False, max_new_tokens=6)
        assert torch.equal(single[0], batched[b, : single.shape[1]])
    replay(model, shown(data), compression)


@torch.no_grad()
def test_videos_of_different_lengths_in_one_batch(model, data):
    short, whole = data["a_video8.data0"][:4], data["a_video8.data0"]
    features = model.image_features([(short, "video"), (whole[0], "image"), (whole, "video")])
    assert [len(part) for part in features] == [27, 45, 45]
    torch.testing.assert_close(features[0], model.image_features([(short, "video")])[0], **CLOSE)
    torch.testing.assert_close(
        features[1], model.image_features([(whole[:1].expand(8, -1, -1, -1), "video")])[0], **CLOSE
    )


def test_tokenizer_multimodal_token():
    tokenizers = {name: AutoTokenizer.from_pretrained(folder) for name, folder in TOKENIZERS.items()}
    cases = json.loads((GOLDEN / "tokenizer_multimodal_token.json").read_text())
    assert len(cases) == 12
    for case in cases:
        got = video.tokenizer_multimodal_token(
            case["prompt"], tokenizers[case["tokenizer"]], case["multimodal_token"]
        )
        assert got == case["input_ids"], case


def test_frame_sample():
    assert video.frame_sample(100, num_frames=8).tolist() == [6, 19, 31, 43, 56, 68, 80, 93]
    assert video.frame_sample(9, num_frames=8).tolist() == [1, 2, 3, 4, 5, 6, 7, 8]  # 0.5, 1.5 … rounded up
    assert video.frame_sample(3, num_frames=8).tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
    assert video.frame_sample(75, "fps", fps=25.0).tolist() == [12, 37, 62]
    assert video.frame_sample(3, "fps", fps=0.5).tolist() == [0, 1, 2]
    for wrong in (
        dict(duration=0, num_frames=8),
        dict(duration=5),
        dict(duration=5, mode="fps"),
        dict(duration=5, mode="all"),
    ):
        with pytest.raises(ValueError, match="no frames to choose|frame_sample needs"):
            video.frame_sample(**wrong)


def write_video(path: Path, codec: str, frames: int = 40, **options) -> None:
    """Ten frames a second of 64 x 48 pixels, each a little brighter than the one before."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 4_000_000
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 6 * i, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def numbers(frames: list[Image.Image]) -> list[float]:
    return [float(np.asarray(frame).mean()) / 6 for frame in frames]


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "mpeg4", {}),
        ("b.mp4", "libx264", {"bf": "3", "g": "12"}),
        ("c.mkv", "mpeg4", {}),
        ("d.avi", "mpeg4", {}),
    ],
)
def test_frames_of_a_video_file(tmp_path, name, codec, options):
    try:
        write_video(tmp_path / name, codec, **options)
    except ValueError:
        pytest.skip(f"this FFmpeg cannot write {codec}")
    frames = video.load_frames(tmp_path / name)
    assert len(frames) == 8 and frames[0].size == (64, 48) and frames[0].mode == "RGB"
    assert numbers(frames) == pytest.approx(video.frame_sample(40, num_frames=8).tolist(), abs=0.4)
    assert numbers(video.load_frames(tmp_path / name, num_frames=None)) == pytest.approx(
        [5, 15, 25, 35], abs=0.4
    )
    part = video.load_frames(tmp_path / name, num_frames=4, s=1.0, e=2.0)  # frames 9 to 19
    assert numbers(part) == pytest.approx([10, 13, 15, 18], abs=0.4)


def test_process_video_and_image(tmp_path):
    processor = CLIPImageProcessor.from_pretrained(GOLDEN / "clip_tower")
    pictures = [Image.new("RGB", (40, 20), (25 * i, 0, 0)) for i in range(10)]
    (tmp_path / "frames").mkdir()
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / "frames" / f"{i:02}.png")
    from_folder = video.process_video(tmp_path / "frames", processor)
    chosen = video.frame_sample(10, num_frames=8).tolist()
    assert from_folder.shape == (8, 3, 56, 56)
    assert torch.equal(from_folder, torch.cat([video.process_image(pictures[i], processor) for i in chosen]))
    assert torch.equal(from_folder, video.process_video([np.asarray(pictures[i]) for i in chosen], processor))
    cut = video.process_video(pictures[:1] * 8, processor, aspect_ratio=None)
    assert (
        cut.std((2, 3)).amax() == 0 and video.process_image(pictures[0], processor).std((2, 3)).amin() > 0
    )  # the border
    few = video.process_video(pictures[5:7], processor, aspect_ratio=None)
    black = video.process_image(Image.new("RGB", (40, 20)), processor, aspect_ratio=None)
    assert torch.equal(few[2:], black.expand(6, -1, -1, -1)) and not torch.equal(few[1], black[0])
    assert len(video.process_video(pictures * 4, processor, num_frames=None)) == 32


def test_prompt_and_answer(loaded, data):
    tokenizer, model = loaded[:2]
    prompt = video.chat_prompt("What happens?", tokenizer)
    assert prompt.startswith("system: <<SYS>>\nYou are a helpful")
    assert prompt.endswith("user: <video>\nWhat happens?\nassistant:")
    asked = {}
    generate = model.generate
    try:
        model.generate = lambda ids, **options: asked.update(ids=ids, **options) or generate(ids, **options)
        answer = video.mm_infer(data["a_video8.data0"], "What happens?", model, tokenizer, max_new_tokens=4)
    finally:
        del model.generate
    assert isinstance(answer, str) and asked["ids"].tolist() == [
        video.tokenizer_multimodal_token(prompt, tokenizer, "<video>")
    ]
    assert (
        (asked["ids"] == -201).sum() == 1 and asked["images"][0][1] == "video" and asked["do_sample"] is False
    )
    with pytest.raises(ValueError, match="modal 'audio' is unknown"):
        video.chat_prompt("What is heard?", tokenizer, "audio")


def test_what_cannot_work_is_refused_in_a_sentence(model, data, tmp_path, monkeypatch):
    ids, pixels = data["a_video8.input_ids"], data["a_video8.data0"]
    with pytest.raises(ValueError, match="must be a list of pairs"):
        model(ids, images=pixels)
    with pytest.raises(ValueError, match=r"negative ids other than this model's placeholders \[-200, -201\]"):
        model(torch.tensor([[1, -202, 5]]), images=[(pixels, "video")])
    with pytest.raises(
        ValueError, match="'mlp2x_gelu' is not supported for videos; the connectors are stc_connector, stc_"
    ):
        settings = {**model.config.to_dict(), "mm_projector_type": "mlp2x_gelu"}
        Videollama2MistralForCausalLM(Videollama2MistralConfig(**settings))
    with pytest.raises(ValueError, match="nothing.mp4 cannot be read"):
        video.load_frames(tmp_path / "nothing.mp4")
    (tmp_path / "text.mp4").write_text("no video at all")
    with pytest.raises(ValueError, match="text.mp4 cannot be read"):
        video.load_frames(tmp_path / "text.mp4")
    write_video(tmp_path / "short.mp4", "mpeg4", 10)
    with pytest.raises(ValueError, match=r"no frame in the part asked for \(it has 10 in 1.0 seconds\)"):
        video.load_frames(tmp_path / "short.mp4", s=5.0, e=6.0)
    with pytest.raises(ValueError, match="the list of frames is empty"):
        video.process_video([], None)
    imported = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *rest: missing(name) or imported(name, *rest))
    with pytest.raises(ValueError, match="connector needs timm .*pip install timm"):
        build_vision_projector(model.config)
    with pytest.raises(ValueError, match="needs PyAV .*pip install av"):
        video.load_frames(tmp_path / "short.mp4")


def missing(name: str) -> None:
    if name.split(".")[0] in ("timm", "av"):
        raise ImportError(f"No module named {name!r}")
