"""The embedded model: it answers questions about images it has never seen, alone and in a batch, whole and
compressed."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from libra import Compression
from libra.mini.questions import SCENE_TYPES
from libra.mini.scenes import draw_scene
from llava.mm_utils import process_images, tokenizer_image_token
from mini import pace

CHECKPOINT = Path(__file__).parents[1] / "mini" / "checkpoint"


def ask(loaded, kind: str, count: int, compression: Compression | None = None, batch: int = 16):
    """Answers of the model and the right ones, for ``count`` fresh test scenes; also which rows had
    compensation tokens."""
    tokenizer, model, processor, _ = loaded
    model.set_compression(compression)
    rng = np.random.default_rng(7)
    prompts, images, answers = [], [], []
    while len(prompts) < count:
        scene = draw_scene(rng, "test")
        question = SCENE_TYPES[kind][0](rng, scene.digits)
        if question is not None:
            prompt = f"USER: <image>\n{question[0]} ASSISTANT:"
            prompts.append(tokenizer_image_token(prompt, tokenizer, return_tensors="pt"))
            images.append(Image.fromarray(scene.image))
            answers.append(question[1])
    pixels = process_images(images, processor, model.config)
    said, compensated = [], []
    for start in range(0, count, batch):
        rows = prompts[start : start + batch]
        width = max(map(len, rows))
        ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
        mask = torch.stack(
            [torch.nn.functional.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows]
        )
        out = model.generate(
            ids, images=pixels[start : start + batch], attention_mask=mask, do_sample=False, max_new_tokens=8
        )
        said += [text.strip() for text in tokenizer.batch_decode(out, skip_special_tokens=True)]
        if compression is not None:
            by_layer = [layer for layer in model.compression_stats["compensation_tokens"] if layer]
            compensated += [any(row) for row in zip(*by_layer)]
    return said, answers, compensated


@pytest.mark.parametrize("kind", ["position", "attribute", "relation", "yes_no"])
def test_it_sees(loaded, kind):
    said, answers, _ = ask(loaded, kind, 32)
    assert np.mean([a == b for a, b in zip(said, answers)]) > 0.8


def test_equal_prompts_that_become_unequal_answer_as_alone(loaded):
    """Prompts of one length need no padding until some rows get a compensation token: the last column has to
    stay valid."""
    compression = Compression(method="libra", layers=(2, 5, 8), ratio=0.5)
    batch, _, compensated = ask(loaded, "reading", 32, compression)
    alone, _, _ = ask(loaded, "reading", 32, compression, batch=1)
    assert any(compensated) and not all(compensated[:16])
    assert batch == alone


def test_a_prompt_without_an_image_is_refused_where_compression_is_asked(loaded):
    tokenizer, model, _, _ = loaded
    ids = tokenizer("USER: what digit is at the top left ? ASSISTANT:", return_tensors="pt").input_ids
    model.set_compression(Compression(method="libra", layers=(2,), ratio=0.5))
    with pytest.raises(ValueError, match="no image to compress"):
        model.generate(ids, do_sample=False, max_new_tokens=2)
    model.set_compression(None)
    assert model.generate(ids, do_sample=False, max_new_tokens=2).shape[0] == 1


def test_its_pace_is_measured_in_turns(capsys):
    assert pace.main(["--pairs", "1", "--row", "mini/r67"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, part in zip(lines[:2], ("prefill", "decode"), strict=True):
        assert re.fullmatch(part + r": \d+\.\d\d ms of CPU time, compressed \d\.\d{3} of it \[.*\]", line)


def test_its_pace_has_no_checkpoint_elsewhere(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        pace.main(["--checkpoint", str(tmp_path / "none"), "--pairs", "1"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and str(tmp_path / "none") in said
