"""Stage 1: a small CLIP, whose [CLS] token tells captions apart and whose patches tell what lies on them."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from transformers import CLIPModel

from libra.mini.questions import pick
from libra.mini.scenes import draw_scene
from libra.mini.shapes import easy_vqa, see_shape

from .build import GRID
from .captions import MOST_TOKENS, scene_captions, shape_captions
from .patches import PatchHeads, scene_patches, shape_patches

EASY_VQA_SHARE = 1 / 16
LARGEST_SCALE = 60.0


def ramp(part: float, start: float, stop: float) -> float:
    """0 up to ``start``, 1 from ``stop`` on, linear between."""
    return min(1.0, max(0.0, (part - start) / (stop - start)))


def caption_ids(tokenizer, captions: list[str]) -> torch.Tensor:
    """(captions, MOST_TOKENS), each between a start and an end token."""
    rows = []
    for caption in captions:  # a token is a word: five times as fast as the tokenizer's own call
        words = [tokenizer.bos_token, *caption.split(), tokenizer.eos_token]
        rows.append(
            tokenizer.convert_tokens_to_ids(words + [tokenizer.pad_token] * (MOST_TOKENS - len(words)))
        )
    return torch.tensor(rows)


@dataclass
class Captioned(Dataset):
    """Image ``index`` with its patch labels, a true caption and two near misses.

    Small digits and clutter come in between the two parts of the training that ``ramp`` names.
    """

    size: int
    seed: int
    tokenizer: object
    ramp: tuple[float, float] = (0.25, 0.5)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([self.seed, 1, index])
        part = index / self.size
        if rng.random() < EASY_VQA_SHARE:
            paths, _ = easy_vqa("train")
            shape = see_shape(paths[pick(rng, list(paths))], GRID)
            sample, captions = shape_patches(shape), shape_captions(rng, shape)
        else:
            scene = draw_scene(rng, "train", GRID, difficulty=ramp(part, *self.ramp))
            sample, captions = scene_patches(scene), scene_captions(rng, scene.digits)
        return {**sample, "captions": caption_ids(self.tokenizer, captions), "part": torch.tensor(part)}


class SmallClip(nn.Module):
    """The towers with patch heads on the layer that LLaVA selects, the last but one."""

    def __init__(self, clip: CLIPModel):
        super().__init__()
        self.clip, self.heads = clip, PatchHeads()

    def forward(self, images, captions, things, paints, patch_weights, part) -> dict[str, torch.Tensor]:
        """The loss of (B, …) images with (B, 3, tokens) captions, of which the first is true.

        The contrast counts little until the digits are named: at full weight from the start they never are.
        """
        states = self.clip.vision_model(images, output_hidden_states=True)
        dense = self.heads(states.hidden_states[-2][:, 1:], things, paints, patch_weights)
        seen = self.clip.visual_projection(states.pooler_output)
        read = self.clip.text_projection(self.clip.text_model(captions.flatten(0, 1)).pooler_output)
        with torch.autocast("cpu", enabled=False):  # bfloat16 would blur the differences between captions
            logits, near = similarities(seen.float(), read.float().unflatten(0, captions.shape[:2]))
            scale = self.clip.logit_scale.exp().clamp(max=LARGEST_SCALE)
            contrast = contrastive_loss(scale * logits, scale * near, same_rows(captions[:, 0]))
        weight = max(0.2, ramp(float(part.mean()), 0.2, 0.5))
        return {"loss": dense + weight * contrast}


def similarities(seen, read) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines of images (B, D) with captions (B, 3, D): (B, B) with all true ones, (B, 2) with their near
    misses."""
    seen, read = F.normalize(seen, dim=-1), F.normalize(read, dim=-1)
    return seen @ read[:, 0].T, (seen[:, None] * read[:, 1:]).sum(-1)


def same_rows(captions: torch.Tensor) -> torch.Tensor:
    """(B, B): which other rows have the same caption, and so are no negatives."""
    same = (captions[:, None] == captions[None]).all(-1)
    return same & ~torch.eye(len(captions), dtype=torch.bool)


def contrastive_loss(logits, near, same) -> torch.Tensor:
    """CLIP's symmetric loss of (B, B) logits, images by captions, with (B, 2) logits of near misses among the
    captions."""
    target = torch.arange(len(logits))
    logits = logits.masked_fill(same, torch.finfo(logits.dtype).min)
    return (F.cross_entropy(torch.cat([logits, near], 1), target) + F.cross_entropy(logits.T, target)) / 2
