"""The embedded model's training: what it shows and asks, how texts share an image, what a stopped run
does."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, get_scheduler

from libra.mini.scenes import BIG_SIZES, NOTHING, SMALL_SIZES, draw_scene
from libra.mini.shapes import easy_vqa, easy_vqa_image, see_shape
from llava.constants import IGNORE_INDEX
from mini.answering import VISUAL, Answerer, Questioned, position_steps
from mini.build import GRID, build_clip, build_model, build_tokenizer, image_processor, save_clip
from mini.captions import MOST_TOKENS, near_miss, scene_captions
from mini.contrast import Captioned, caption_ids, contrastive_loss, same_rows
from mini.optimizer import build_optimizer
from mini.packing import EMPTY, PREFIX, SLOT, SLOTS, Encoder, pack
from mini.patches import pixels_of, scene_patches
from mini.questions import TRAINED, ask
from mini.shared_prefix import NAME as SHARED_PREFIX

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def tower(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip") / "tower"
    save_clip(build_clip(tokenizer, 3), tokenizer, folder)
    return folder


def test_scenes_grow_harder_with_difficulty():
    rng = np.random.default_rng(0)
    easy = [draw_scene(rng, "train", GRID, difficulty=0.0, most=2) for _ in range(40)]
    hard = [draw_scene(rng, "train", GRID) for _ in range(40)]
    assert {len(scene.digits) for scene in easy} == {2} and max(len(scene.digits) for scene in hard) == 6

    def areas(scenes):  # patches a digit
        return [np.sum(scene.owners == i) for scene in scenes for i in range(len(scene.digits))]

    assert min(areas(easy)) > (min(BIG_SIZES) / 2 / 6) ** 2 and np.mean(areas(hard)) < 0.8 * np.mean(
        areas(easy)
    )
    small = draw_scene(rng, "test", GRID, small=True)
    assert max(areas([small])) <= (max(SMALL_SIZES) // 6 + 2) ** 2


def test_no_glyph_is_in_two_splits():
    from libra.mini.scenes import glyphs

    splits = {split: np.concatenate(numbers) for split, numbers in glyphs()[1].items()}
    numbers = np.concatenate(list(splits.values()))
    assert len(numbers) == len(set(numbers.tolist())) == 1797
    assert set(easy_vqa("train")[0]).isdisjoint(easy_vqa("validation")[0])


def test_pixels_are_the_image_processors():
    scene = draw_scene(np.random.default_rng(1), "train", GRID)
    paths, by_image = easy_vqa("train")
    number = sorted(paths)[7]
    shape = see_shape(paths[number], GRID)
    for array, image in (
        (scene.image, Image.fromarray(scene.image)),
        (shape.image, easy_vqa_image(paths[number])),
    ):
        theirs = image_processor()(image, return_tensors="pt").pixel_values[0]
        torch.testing.assert_close(pixels_of(array), theirs, atol=1e-6, rtol=0)
    answers = dict(by_image[number])
    assert answers.get("what shape is in the image ?", shape.name) == shape.name
    assert answers.get("what is the color of the shape ?", shape.color) == shape.color


def test_every_digit_weighs_the_same_however_small():
    scene = draw_scene(np.random.default_rng(5), "train", GRID)
    weights = scene_patches(scene)["patch_weights"].numpy()
    totals = [weights[scene.owners == owner].sum() for owner in (NOTHING, *range(len(scene.digits)))]
    np.testing.assert_allclose(totals, 1, rtol=1e-5)


def test_near_misses_change_one_thing_and_captions_fit(tokenizer):
    rng = np.random.default_rng(2)
    longest = 0
    for _ in range(60):
        digits = list(draw_scene(rng, "train", GRID).digits)
        changed = set(near_miss(rng, digits)) ^ set(digits)
        assert len(changed) == 2
        ids = caption_ids(tokenizer, captions := scene_captions(rng, tuple(digits)))
        assert len(set(captions)) >= 2 and captions[0] not in captions[1:] and ids.shape == (3, MOST_TOKENS)
        assert (ids == tokenizer.eos_token_id).sum(1).tolist() == [1, 1, 1]
        assert not (ids == tokenizer.unk_token_id)[
            :, : int((ids[0] == tokenizer.eos_token_id).int().argmax())
        ].any()
        longest = max(longest, int((ids != tokenizer.pad_token_id).sum(1).max()))
    assert longest <= MOST_TOKENS
    text = caption_ids(tokenizer, ["red 3 top left"])[0, :6].tolist()
    assert text == tokenizer("red 3 top left </s>").input_ids


def test_the_text_tower_reads_a_text_at_its_end(tower, tokenizer):
    """transformers takes the largest token number for a text's end where the end token has number 2."""
    clip = CLIPModel.from_pretrained(tower)
    texts = ("yellow 3 top left", "yellow 3 top right")  # "yellow" has the largest number of the words
    one, other = (clip.text_model(caption_ids(tokenizer, [text])).pooler_output for text in texts)
    assert not torch.allclose(one, other)
    states = clip.text_model(ids := caption_ids(tokenizer, ["yellow 3"])).last_hidden_state
    torch.testing.assert_close(clip.text_model(ids).pooler_output, states[:, 3])


def test_equal_captions_are_no_negatives():
    captions = torch.tensor([[1, 2], [1, 2], [1, 3]])
    same = same_rows(captions)
    assert same.tolist() == [[False, True, False], [True, False, False], [False] * 3]
    logits = torch.eye(3) * 50
    logits[0, 1] = logits[1, 0] = 80.0  # would be a great loss
    assert contrastive_loss(logits, torch.full((3, 2), -50.0), same) < 1e-4
    assert contrastive_loss(logits, torch.full((3, 2), 99.0), same) > 10


def test_weights_of_the_types_change_in_the_last_third():
    rng = np.random.default_rng(4)

    def share(part):
        drawn = Counter()
        for _ in range(40):
            digits = draw_scene(rng, "train", GRID).digits
            drawn.update(
                bool(re.search(r"at the .* \? A .* D ", question))
                for question, _ in ask(rng, digits, 25, part)
            )
        return drawn[True] / drawn.total()

    assert share(0.5) < 0.14 < 0.17 < share(0.7)
    assert TRAINED["multiple_choice"].late / sum(kind.late for kind in TRAINED.values()) > 0.2


def test_what_comes_before_the_last_third_does_not_depend_on_the_length(tokenizer):
    short, long = (Questioned(size, 1, tokenizer, easy=300) for size in (900, 3000))
    for index in (3, 200, 599):
        one, other = dict(short[index]), dict(long[index])
        one.pop("part"), other.pop("part")
        assert all(torch.equal(one[name], other[name]) for name in one)
    late = short[601]["input_ids"], long[601]["input_ids"]
    assert not torch.equal(*late)
    first = Captioned(1000, 1, tokenizer)[0]
    assert first["captions"].shape == (3, MOST_TOKENS) and first["things"].shape == (VISUAL,)


def test_texts_in_slots_keep_apart(tokenizer):
    questions = ask(np.random.default_rng(0), draw_scene(np.random.default_rng(0), "train", GRID).digits, 32)
    packed, found = pack(Encoder(tokenizer), questions)
    assert (
        all(values.shape == (SLOTS, SLOT) for values in packed.values())
        and sum(where is not None for where in found) > 15
    )
    for (question, answer), where in zip(questions, found, strict=True):
        if where is None:
            continue
        slot, number = where
        mine = packed["text_ids"][slot] == number
        text = tokenizer(f"{question} ASSISTANT : {answer} </s>", add_special_tokens=False).input_ids
        assert packed["input_ids"][slot][mine].tolist() == text[:-1]
        assert packed["places"][slot][mine].tolist() == list(range(len(text) - 1))
        labels, weights = packed["labels"][slot][mine], packed["weights"][slot][mine]
        reply = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        assert labels[labels != IGNORE_INDEX].tolist() == reply
        assert weights[weights > 0].tolist() == pytest.approx([len(reply) ** -0.5] * len(reply))
    empty = packed["text_ids"] == EMPTY
    assert (packed["labels"][empty] == IGNORE_INDEX).all() and not packed["weights"][empty].any()


def test_a_packed_text_is_answered_as_if_it_stood_alone(tower, tokenizer):
    """Positions jittered, slots shared: logits equal those of the product's forward of one text."""
    llava = build_model(tower, tokenizer, 1).eval()
    llava.config._attn_implementation = SHARED_PREFIX
    module = Answerer(llava, tokenizer)
    rng = np.random.default_rng(1)
    scene = draw_scene(rng, "train", GRID)
    questions = ask(rng, scene.digits, 12)
    packed, found = pack(Encoder(tokenizer), questions)
    batch = {name: values[None] for name, values in packed.items()}
    steps = (torch.rand(1, VISUAL, generator=torch.Generator().manual_seed(1)) < 0.6).long()
    images = pixels_of(scene.image)[None]
    answers = batch["labels"] != IGNORE_INDEX
    with torch.no_grad():
        mine, visual = module.logits(
            images, batch["input_ids"], batch["text_ids"], batch["places"], steps, answers
        )
        llava.config._attn_implementation = "sdpa"
        logits = torch.zeros(*answers.shape, mine.shape[-1])
        logits[answers] = mine
        for (question, answer), where in list(zip(questions, found, strict=True))[:4]:
            text = tokenizer(
                f"{question} ASSISTANT : {answer}", add_special_tokens=False, return_tensors="pt"
            ).input_ids
            head = tokenizer(PREFIX, return_tensors="pt").input_ids
            embed = llava.get_input_embeddings()
            seen = 2 + steps.cumsum(1)
            positions = torch.cat(
                [torch.arange(3)[None], seen, seen[:, -1:] + 1 + torch.arange(text.shape[1])], 1
            )
            # without a mask, transformers would take repeated positions for several sequences in a row
            alone = llava.model(
                inputs_embeds=torch.cat([embed(head), visual, embed(text)], 1),
                position_ids=positions,
                use_cache=False,
                attention_mask=torch.ones_like(positions),
            ).last_hidden_state
            slot, number = where
            chosen = (batch["text_ids"][0, slot] == number) & answers[0, slot]
            expected = llava.lm_head(alone)[0, -int(chosen.sum()) :]
            torch.testing.assert_close(logits[0, slot][chosen], expected, atol=2e-5, rtol=1e-4)


def test_positions_are_jittered_in_some_images_only():
    rng = np.random.default_rng(0)
    steps = torch.stack([position_steps(rng) for _ in range(200)])
    jittered = (steps == 0).any(1).float().mean()
    assert 0.2 < jittered < 0.4 and set(steps.unique().tolist()) == {0, 1}


def test_two_optimizers_follow_one_schedule_and_come_back(tower, tokenizer):
    def made():
        module = Answerer(build_model(tower, tokenizer, 1), tokenizer)
        optimizer = build_optimizer(module, 0.01, 0.001, 0.03)
        return module, optimizer, get_scheduler("linear", optimizer, 0, 10)

    def go(module, optimizer, schedule, steps):
        torch.manual_seed(int(schedule.last_epoch))
        for _ in range(steps):
            for value in module.parameters():
                if value.requires_grad:
                    value.grad = torch.randn_like(value) * (1 + schedule.last_epoch)
            optimizer.step()
            schedule.step()

    one, another = made(), made()
    count = sum(value.requires_grad for value in one[0].parameters())
    assert sum(len(group["params"]) for group in one[1].param_groups) == count
    assert not any(value.requires_grad for value in one[0].llava.get_vision_tower().parameters())
    go(*one, 2)
    assert [group["lr"] for group in one[1].param_groups] == pytest.approx([0.008, 0.0008])
    another[0].load_state_dict(one[0].state_dict())
    another[1].load_state_dict(copy.deepcopy(one[1].state_dict()))  # a state is loaded without a copy
    another[2].load_state_dict(one[2].state_dict())
    go(*one, 2), go(*another, 2)
    assert all(torch.equal(a, b) for a, b in zip(one[0].parameters(), another[0].parameters(), strict=True))


def train(output: Path, *options: str) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "mini.train",
        "--output",
        str(output),
        "--validation",
        "8",
        *options,
    ]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_both_stages_run_are_killed_go_on_and_give_a_checkpoint(tmp_path):
    """The settings of another run are refused; the checkpoint answers, and holds CLIP's two towers next to
    LLaVA's files."""
    short = ("--stage1-steps", "2", "--stage2-steps", "6", "--validate-every", "3", "--save-every", "1")
    first = train(tmp_path, *short)
    deadline = time.monotonic() + 400
    while not list(tmp_path.glob("work/stage2/checkpoint-3/trainer_state.json")):
        assert first.poll() is None and time.monotonic() < deadline, first.stdout.read()
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (tmp_path / "checkpoint").exists()
    for wrong, message in ((("--seed", "2"), "name another --output"), (("--stage2-steps", "3"), "too late")):
        refused = train(tmp_path, *short, *wrong)
        output = refused.communicate()[0]
        assert refused.returncode == 1 and message in output
    again = train(tmp_path, *short)
    assert "step 6:" in again.communicate()[0] and again.returncode == 0
    log = json.loads((tmp_path / "work/stage2/log.json").read_text())
    assert [entry["step"] for entry in log if "scores" in entry] == [3, 6]
    assert CLIPModel.from_pretrained(tmp_path / "checkpoint/vision_tower").dtype == torch.float16
    assert sum(path.stat().st_size for path in tmp_path.glob("checkpoint/**/*")) < 12e6


def test_the_command_trains_as_long_as_both_seeds_were():
    logs = [
        json.loads((REPOSITORY / "mini" / name).read_text())
        for name in ("training_log.json", "seed1/training_log.json")
    ]
    said = subprocess.run(
        [sys.executable, "-m", "mini.train", "--help"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for stage in ("stage1", "stage2"):
        (steps,) = {log[stage]["losses"][-1]["step"] for log in logs}
        assert re.search(rf"--{stage}-steps.*?\(default {steps}\)", said, re.DOTALL)
    card = (REPOSITORY / "mini/README.md").read_text(encoding="utf-8")
    assert "--seed SEED default 0," in " ".join(said.split()) and "bfloat16 autocast, seed 0." in card


def test_where_the_class_token_looks():
    from mini.attention import area_under_curve

    scores, positive = torch.tensor([0.1, 0.4, 0.3, 0.2]), torch.tensor([False, True, False, True])
    assert area_under_curve(scores, positive) == 0.75
    assert area_under_curve(scores, scores > 0.25) == 1.0


def test_the_card_draws_both_stages(tmp_path):
    from mini.card import draw, read_log

    for stage in ("stage1", "stage2"):
        entries = [
            {"step": 25, "loss": "2.5", "seconds": 30.0},
            {"step": 25, "scores": {"find": 40.0}},
            {"train_loss": 1},
        ]
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "log.json").write_text(json.dumps(entries))
    log = read_log(tmp_path)
    assert log["stage2"]["losses"] == [{"step": 25, "loss": 2.5, "seconds": 30.0}]
    assert log["stage2"]["scores"] == [{"step": 25, "scores": {"find": 40.0}}]
    draw(log, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as image:
        assert image.size > (800, 600)
