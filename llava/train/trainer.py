"""What training here adds to transformers' Trainer: saving in LLaVA's checkpoint layout."""

from pathlib import Path

TOWER_KEY = "model.vision_tower."


def save_llava(model, tokenizer, folder: Path, tower_folder: str = "vision_tower") -> None:
    """Write a checkpoint in the original's layout: language model and projector in ``folder``, the tower in a folder inside it.

    ``mm_vision_tower`` in the written configuration is that inner folder's relative name.
    """
    tower = model.get_vision_tower()
    tower.vision_tower.save_pretrained(folder / tower_folder)
    tower.image_processor.save_pretrained(folder / tower_folder)
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(TOWER_KEY)}
    trained_with, model.config.mm_vision_tower = model.config.mm_vision_tower, tower_folder
    try:
        model.save_pretrained(folder, state_dict=state)
    finally:
        model.config.mm_vision_tower = trained_with
    tokenizer.save_pretrained(folder)
