"""How much a model in training has learned, measured on images with glyphs that neither training nor
benchmark shows."""

from collections import defaultdict

import numpy as np
import torch
from transformers import TrainerCallback

from libra.mini.questions import EASY_VQA, SCENE_TYPES, pick
from libra.mini.scenes import draw_scene
from libra.mini.shapes import easy_vqa, see_shape
from llava.constants import IGNORE_INDEX

from .answering import VISUAL, Answerer
from .build import GRID
from .captions import scene_captions
from .contrast import SmallClip, caption_ids, similarities
from .packing import Encoder, pack
from .patches import THINGS, pixels_of
from .questions import TRAINED

BATCH = 8
Scores = dict[str, float]  # per cent


def _percent(found: dict[str, list[bool]]) -> Scores:
    return {name: round(100 * float(np.mean(values)), 1) for name, values in sorted(found.items())}


class TowerScores:
    """Digits that the patch heads name, big and small, and captions told from those of other images and near
    misses."""

    def __init__(self, tokenizer, scenes: int):
        rng = np.random.default_rng([99, 1])
        self.scenes = [draw_scene(rng, "validation", GRID, small=index % 2 == 1) for index in range(scenes)]
        self.captions = torch.stack(
            [caption_ids(tokenizer, scene_captions(rng, scene.digits)) for scene in self.scenes]
        )

    @torch.no_grad()
    def __call__(self, module: SmallClip) -> Scores:
        found = defaultdict(list)
        for start in range(0, len(self.scenes), 2 * BATCH):
            scenes, captions = (
                self.scenes[start : start + 2 * BATCH],
                self.captions[start : start + 2 * BATCH],
            )
            images = torch.stack([pixels_of(scene.image) for scene in scenes])
            states = module.clip.vision_model(images, output_hidden_states=True)
            named = module.heads.thing(states.hidden_states[-2][:, 1:])[..., :10].log_softmax(-1)
            for i, scene in enumerate(scenes):
                for number, digit in enumerate(scene.digits):
                    mine = torch.from_numpy(scene.owners == number)
                    guess = THINGS[int(named[i, mine].mean(0).argmax())] if mine.any() else None
                    found["digits_small" if (start + i) % 2 else "digits_big"].append(
                        guess == str(digit.value)
                    )
            read = module.clip.text_projection(module.clip.text_model(captions.flatten(0, 1)).pooler_output)
            read = read.unflatten(0, captions.shape[:2])
            right, near = similarities(module.clip.visual_projection(states.pooler_output), read)
            found["caption_of_16"] += (right.argmax(1) == torch.arange(len(scenes))).tolist()
            found["near_misses_beaten"] += (right.diagonal()[:, None] > near).all(1).tolist()
        return _percent(found)


class AnswerScores:
    """Exact match of every type of question, by teacher forcing, which is right where greedy decoding is."""

    def __init__(self, tokenizer, images: int):
        rng = np.random.default_rng([99, 2])
        encoder = Encoder(tokenizer)
        samples, self.kinds = [], []
        for index in range(images // BATCH * BATCH):
            pixels, asked = (
                _shape_questions(rng) if index % 6 == 5 else _scene_questions(rng, small=index % 2 == 1)
            )
            texts, found = pack(encoder, [question for _, question in asked])
            samples.append({"images": pixels, "steps": torch.ones(VISUAL, dtype=torch.long), **texts})
            self.kinds.append([(kind, where) for (kind, _), where in zip(asked, found) if where is not None])
        self.data = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}

    @torch.no_grad()
    def __call__(self, module: Answerer) -> Scores:
        found = defaultdict(list)
        for start in range(0, len(self.kinds), BATCH):
            part = {name: values[start : start + BATCH] for name, values in self.data.items()}
            answers = part["labels"] != IGNORE_INDEX
            with torch.autocast("cpu", torch.bfloat16):
                logits, _ = module.logits(
                    *(part[n] for n in ("images", "input_ids", "text_ids", "places", "steps")), answers
                )
            wrong = torch.zeros_like(answers)
            wrong[answers] = logits.argmax(-1) != part["labels"][answers]
            for i, kinds in enumerate(self.kinds[start : start + BATCH]):
                for kind, (slot, text) in kinds:
                    found[kind].append(not wrong[i, slot][part["text_ids"][i, slot] == text].any().item())
        return _percent(found)


def _scene_questions(rng, small: bool):
    """A scene's pixels with a question of each type, reading and captions by the digits' size."""
    scene = draw_scene(rng, "validation", GRID, small=small)
    makers = {name: kind.make for name, kind in SCENE_TYPES.items() if kind.small in (None, small)}
    makers |= {name: kind.make for name, kind in TRAINED.items() if name not in SCENE_TYPES}
    asked = [(name, make(rng, scene.digits)) for name, make in makers.items()]
    return pixels_of(scene.image), [(name, question) for name, question in asked if question is not None]


def _shape_questions(rng):
    paths, by_image = easy_vqa("validation")
    number = pick(rng, sorted(paths))
    some = rng.permutation(len(by_image[number]))[:6]
    return pixels_of(see_shape(paths[number], GRID).image), [(EASY_VQA, by_image[number][i]) for i in some]


class Validate(TrainerCallback):
    """Put scores into the log every ``every`` steps and at the end; the first process measures while the
    others wait."""

    def __init__(self, scores, every: int):
        self.scores, self.every = scores, every

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.is_world_process_zero and (
            state.global_step % self.every == 0 or state.global_step == state.max_steps
        ):
            model.eval()
            scores = self.scores(model)
            model.train()
            state.log_history.append({"step": state.global_step, "scores": scores})
            print(
                f"step {state.global_step}:",
                " ".join(f"{name} {value:.0f}" for name, value in scores.items()),
                flush=True,
            )
