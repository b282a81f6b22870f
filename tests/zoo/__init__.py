"""Tiny random models of the vision-language classes of transformers, each with a real tower."""

from collections.abc import Callable
from functools import cache

import families
import torch
import transformers
from packaging.specifiers import SpecifierSet

from . import grids, others, tiles
from .refused import REASONS, hollow, possible

KINDS = {**families.KINDS, **tiles.KINDS, **grids.KINDS, **others.KINDS}
__all__ = ["REASONS", "hollow", "possible"]
# There they fail without libra too: Llama 4 and Fuyu in their forward; rows of MiniMax M3 differ in a batch.
BROKEN = {
    "FuyuForCausalLM": SpecifierSet("<=5.19.0"),
    "Llama4ForConditionalGeneration": SpecifierSet("==5.24.0"),
    "MiniMaxM3SparseForConditionalGeneration": SpecifierSet("==5.19.0"),
}
NAMES = sorted(  # a version may lack some
    name
    for name in KINDS
    if hasattr(transformers, name) and transformers.__version__ not in BROKEN.get(name, SpecifierSet("<0"))
)
EAGER = ("GotOcr2ForConditionalGeneration", "Inkling2ForConditionalGeneration")  # have no other attention

# After which layers a class compresses in the tests, where layers 1 and 3 will not do: they have no attention
# scores, come before features of the picture that are added later, or after keys that are shared.
PLACES = {
    "Gemma3nForConditionalGeneration": (0, 1),
    "Gemma4ForConditionalGeneration": (0, 1),
    "Granite4VisionForConditionalGeneration": (4,),
    "Lfm3VlForConditionalGeneration": (1, 4),
    "NemotronH_Omni_Reasoning_V3": (2, 5),
}
# What the differences of two sound ways may be, over the largest number; 1e-4 elsewhere.
BOUNDS = {"MuseSparkForConditionalGeneration": 1e-3}  # its scores are five times as large
# Whose layer after the places has no scores for score_layer: next, and what is said of it.
RECURRENT = "no attention whose scores could be read"
NO_NEXT = {
    "Lfm2VlForConditionalGeneration": RECURRENT,
    "Llama4ForConditionalGeneration": "score_layer: next cannot read layer 4 .* which attends by chunks",
    "MiniCPMOcrForConditionalGeneration": RECURRENT,
    "MiniCPMV4_6ForConditionalGeneration": RECURRENT,
    "MiniCPMV4_7ForConditionalGeneration": RECURRENT,
    "NemotronH_Omni_Reasoning_V3": "is the last layer and score_layer: next needs one after it",
    "Qwen3_5ForConditionalGeneration": RECURRENT,
    "Qwen3_5MoeForConditionalGeneration": RECURRENT,
}
# Which methods a class refuses at its places, and what is said of it.
NOT_BY = {
    "pyramiddrop": NO_NEXT,
    "dart": {
        "Gemma3nForConditionalGeneration": "method dart compares hidden states after the decoder's final"
        " norm, and the layers of Gemma3nTextModel hand on several streams of them, which are joined after"
    },
}


def places(name: str) -> tuple[int, ...]:
    return PLACES.get(name, (1, 3))


def own_model(name: str, attention: str = "sdpa", seed: int = 0):
    return families.make(KINDS[name], name, "", "eager" if name in EAGER else attention, seed)


model = cache(own_model)  # shared: leave it as it is


@cache
def twin(name: str):
    """The model with eager attention in its decoder; shared: leave it as it is."""
    made = own_model(name, "eager")
    if name == "Phi4MultimodalForCausalLM":  # whose tower is causal or not by the implementation of attention
        tower = made.model.embed_tokens_extend.image_embed.img_processor
        tower.config._attn_implementation = "sdpa"
    return made


def replayed(name: str, length: int) -> Callable[[dict], dict]:
    """Changes what a pass over prompt and answer is given to what decoding is; ``length`` of the prompt."""

    def change(given: dict) -> dict:
        if name == "PaliGemmaForConditionalGeneration":  # only the prompt sees itself in both directions
            given["token_type_ids"][:, length:] = 1
        return given

    return change


def decoder(model) -> torch.nn.Module:
    """The module whose ``layers`` are those of the text."""
    text = model.config.get_text_config(decoder=True)
    (found,) = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "layers", None), torch.nn.ModuleList)
        and getattr(module, "config", None) is text
    ]
    return found


def talk(name: str, pattern: str, seed: int) -> families.Talk:
    return families.talk_of(KINDS[name], pattern, seed)


def collate(
    name: str, talks: list[families.Talk], side: str = "left", labels: bool = False
) -> dict[str, torch.Tensor]:
    return families.batch_of(KINDS[name], talks, side, labels)
