"""Stage 2: the language model answers questions about what the frozen tower sees."""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from libra.mini.questions import pick
from libra.mini.scenes import FEWEST_DIGITS, MOST_DIGITS, draw_scene
from libra.mini.shapes import easy_vqa, see_shape
from llava.constants import IGNORE_INDEX

from .build import GRID
from .contrast import ramp
from .packing import PREFIX, SLOT, Encoder, pack
from .patches import PatchHeads, scene_patches, shape_patches
from .questions import LATE, ask

EASY_VQA_SHARE = 1 / 12
TEXTS = 32  # questions drawn an image, of which about 22 find room
VISUAL = GRID * GRID
JITTERED = 0.3  # share of the images whose positions are not consecutive


def position_steps(rng: np.random.Generator) -> torch.Tensor:
    """(VISUAL,): how far each visual token's position comes after the one before, 1, or in some images 0 or 1
    by chance.

    So a model meets positions as methods leave them that number the kept tokens anew; no token is ever
    missing in training.
    """
    if rng.random() >= JITTERED:
        return torch.ones(VISUAL, dtype=torch.long)
    if rng.random() < 0.5:
        rates = np.full(VISUAL, rng.uniform(0.2, 1))
    else:  # row by row
        rates = np.repeat(rng.uniform(0.05, 1, GRID), GRID)
    return torch.from_numpy(rng.random(VISUAL) < rates).long()


@dataclass
class Questioned(Dataset):
    """Image ``index`` with its patch labels and packed questions; scenes become full and hard over the first
    ``easy`` images.

    Nothing that comes before the last third depends on ``size``: a training may be made longer or shorter
        until then.
    """

    size: int
    seed: int
    tokenizer: object
    easy: int
    encoder: Encoder = field(init=False)

    def __post_init__(self):
        self.encoder = Encoder(self.tokenizer)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([self.seed, 2, index])
        part = index / self.size
        if rng.random() < EASY_VQA_SHARE:
            paths, by_image = easy_vqa("train")
            number = pick(rng, list(paths))
            sample = shape_patches(see_shape(paths[number], GRID))
            questions = [by_image[number][i] for i in rng.permutation(len(by_image[number]))[:TEXTS]]
        else:
            hard = min(1.0, index / self.easy)
            most = FEWEST_DIGITS + round((MOST_DIGITS - FEWEST_DIGITS) * hard)
            scene = draw_scene(rng, "train", GRID, difficulty=hard, most=most)
            sample, questions = scene_patches(scene), ask(rng, scene.digits, TEXTS, part)
        texts, _ = pack(self.encoder, questions)
        return {**sample, **texts, "steps": position_steps(rng), "part": torch.tensor(part)}


class Answerer(nn.Module):
    """LLaVA on many texts an image; patch heads on the projected visual tokens keep the projector from
    collapsing."""

    def __init__(self, llava, tokenizer):
        super().__init__()
        self.llava, self.heads = llava, PatchHeads()
        self.register_buffer("prefix", torch.tensor(tokenizer(PREFIX).input_ids), persistent=False)

    def logits(self, images, input_ids, text_ids, places, steps, where) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (n, vocabulary) of the n text tokens at ``where`` (B, SLOTS, SLOT), and the visual tokens
        (B, VISUAL, ·)."""
        embed = self.llava.get_input_embeddings()
        visual = self.llava.encode_images(images)
        head = embed(self.prefix).expand(len(images), -1, -1)
        first, after = head.shape[1], head.shape[1] + VISUAL
        seen = first - 1 + steps.cumsum(1)
        positions = torch.cat(
            [torch.arange(first).expand(len(images), -1), seen, seen[:, -1:] + 1 + places.flatten(1)], 1
        )
        hidden = self.llava.model(
            inputs_embeds=torch.cat([head, visual, embed(input_ids.flatten(1))], 1),
            position_ids=positions,
            use_cache=False,
            text_length=SLOT,
            prefix_length=after,
            text_ids=text_ids,
        ).last_hidden_state
        return self.llava.lm_head(hidden[:, after:][where.flatten(1)]).float(), visual

    def forward(
        self, images, input_ids, labels, text_ids, places, weights, steps, things, paints, patch_weights, part
    ):
        """The loss; the patch labels count half, and in the last third of the training less and less."""
        answers = labels != IGNORE_INDEX
        logits, visual = self.logits(images, input_ids, text_ids, places, steps, answers)
        each = F.cross_entropy(logits, labels[answers], reduction="none") * weights[answers]
        dense = self.heads(visual, things, paints, patch_weights)
        return {"loss": each.sum() / weights.sum() + 0.5 * (1 - ramp(float(part.mean()), LATE, 1.0)) * dense}
