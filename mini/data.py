"""Training samples of the embedded model: image number i is the same on every machine, in every process,
after every resume."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from libra.mini.questions import easy_vqa, easy_vqa_image
from libra.mini.scenes import draw_scene
from llava.constants import IGNORE_INDEX

from .build import GRID
from .questions import ask

TEXT_LENGTH = 17  # tokens of the longest question with its answer
TEXTS_PER_IMAGE = 16
EASY_VQA_SHARE = 3 / 16
PREFIX = "USER :"


def _rng(seed: int, index: int) -> np.random.Generator:
    return np.random.default_rng([seed, index])


@dataclass
class SceneLabels(Dataset):
    """Stage 1: scenes with the digit and colour on each patch."""

    size: int
    seed: int
    image_processor: object

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        scene = draw_scene(_rng(self.seed, index), "train", GRID)
        return {
            "images": self.image_processor(Image.fromarray(scene.image), return_tensors="pt").pixel_values[0],
            "digit_labels": torch.from_numpy(scene.digit_labels),
            "color_labels": torch.from_numpy(scene.color_labels),
        }


@dataclass
class ImageTexts(Dataset):
    """Stage 2: an image with many questions and answers, each a text of its own behind the shared image."""

    size: int
    seed: int
    image_processor: object
    tokenizer: object

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        rng = _rng(self.seed, index)
        digit_labels = color_labels = torch.full((GRID * GRID,), IGNORE_INDEX)
        if rng.random() < EASY_VQA_SHARE:
            paths, by_image = easy_vqa("train")
            number = list(paths)[rng.integers(len(paths))]
            image = easy_vqa_image(paths[number])
            questions = [
                by_image[number][i] for i in rng.permutation(len(by_image[number]))[:TEXTS_PER_IMAGE]
            ]
        else:
            scene = draw_scene(rng, "train", GRID)
            image, questions = Image.fromarray(scene.image), ask(rng, scene.digits, TEXTS_PER_IMAGE)
            digit_labels, color_labels = (
                torch.from_numpy(scene.digit_labels),
                torch.from_numpy(scene.color_labels),
            )
        input_ids = torch.full((TEXTS_PER_IMAGE, TEXT_LENGTH), self.tokenizer.pad_token_id)
        labels = torch.full((TEXTS_PER_IMAGE, TEXT_LENGTH), IGNORE_INDEX)
        for row, (question, answer) in enumerate(questions):
            prompt = self.tokenizer(f"{question} ASSISTANT :", add_special_tokens=False).input_ids
            reply = self.tokenizer(answer, add_special_tokens=False).input_ids + [self.tokenizer.eos_token_id]
            text = torch.tensor(prompt + reply)
            input_ids[row, : len(text) - 1] = text[:-1]
            labels[row, len(prompt) - 1 : len(text) - 1] = text[
                len(prompt) :
            ]  # already shifted: the next token
        return {
            "images": self.image_processor(image, return_tensors="pt").pixel_values[0],
            "input_ids": input_ids.flatten(),
            "labels": labels.flatten(),
            "digit_labels": digit_labels,
            "color_labels": color_labels,
        }
