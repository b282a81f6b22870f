"""Names of weights: as transformers' classes hold them ("held"), in llava-hf files, in LLaVA's files and in a
tower's files."""

import re

_Rules = list[tuple[str, str]]

# The first rule that fits renames; a name that none fits stays as it is.
_HF_TO_HELD: _Rules = [
    (r"(?:model\.)?language_model\.lm_head\.", "lm_head."),
    (r"(?:model\.)?language_model\.(?:model\.)?", "model.language_model."),
    (r"(?:model\.)?vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
    (r"(?:model\.)?multi_modal_projector\.", "model.multi_modal_projector."),
    (r"(?:model\.)?image_newline$", "model.image_newline"),
]
_HELD_TO_HF: _Rules = [
    (r"lm_head\.", "language_model.lm_head."),
    (r"model\.language_model\.", "language_model.model."),
    (r"model\.vision_tower\.", "vision_tower.vision_model."),
    (r"model\.multi_modal_projector\.", "multi_modal_projector."),
    (r"model\.image_newline$", "image_newline"),
]
_ORIGINAL_TO_HELD: _Rules = [
    (r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
    (r"model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"model\.(?=embed_tokens\.|layers\.|norm\.)", "model.language_model."),
]
_HELD_TO_ORIGINAL: _Rules = [
    (r"model\.multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"model\.multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    (r"model\.language_model\.", "model."),
]
_TOWER_TO_HELD: _Rules = [
    (r"(?:vision_model\.)?(?=embeddings\.|pre_layrnorm\.|encoder\.|post_layernorm\.)", "model.vision_tower."),
]

EMBEDDINGS, HEAD, TOWER = "model.language_model.embed_tokens.weight", "lm_head.weight", "model.vision_tower."


def _renamed(name: str, rules: _Rules) -> str:
    for pattern, replacement in rules:
        if match := re.match(pattern, name):
            return replacement + name[match.end() :]
    return name


def held_from_hf(name: str) -> str:
    """Takes today's names, transformers' own from 4.52 on, and those of the published llava-hf folders."""
    return _renamed(name, _HF_TO_HELD)


def hf_from_held(name: str) -> str:
    """The names of the published llava-hf folders."""
    return _renamed(name, _HELD_TO_HF)


def held_from_original(name: str) -> str:
    return _renamed(name, _ORIGINAL_TO_HELD)


def original_from_held(name: str) -> str:
    """Of everything but the vision tower, which :func:`tower_from_held` names."""
    return _renamed(name, _HELD_TO_ORIGINAL)


def held_from_tower(name: str) -> str | None:
    """None for what is not a part of CLIP's vision model, such as its text model."""
    held = _renamed(name, _TOWER_TO_HELD)
    return held if held.startswith(TOWER) else None


def tower_from_held(name: str) -> str:
    return "vision_model." + name.removeprefix(TOWER)


def is_buffer(name: str) -> bool:
    """Whether a tensor is computed anew by today's classes; old files hold it."""
    return name.endswith((".inv_freq", ".position_ids"))
