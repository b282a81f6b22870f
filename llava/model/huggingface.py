"""Checkpoints in Hugging Face's format, looked at before transformers reads them."""

from pathlib import Path

from transformers import AutoImageProcessor, AutoProcessor

from libra.utils.sentences import first_line

from .settings import check_depth, check_sizes
from .weights import check_dtype, check_finite, read_json, stored_in


def load(model_class: type, path: str, **options):
    """``model_class.from_pretrained(path, **options)``, after a look at the folder and with one at the
    weights' values.

    A name of the hub is loaded as it is, and its weights' values are looked at too.

    Raises:
        ValueError: if a file is missing or damaged or leads out of the folder, a value of config.json cannot
            be, weights are not finite floating-point numbers, or transformers cannot load the model.
    """
    if Path(path).is_dir():
        check_folder(Path(path))
    try:
        model, info = model_class.from_pretrained(path, output_loading_info=True, **options)
    except Exception as error:  # a damaged checkpoint raises anything
        raise ValueError(f"the model {path} cannot be loaded: {first_line(error)}") from error
    if missing := sorted(info["missing_keys"]):  # transformers would make them up
        raise ValueError(
            f"the model {path} lacks {len(missing)} weights, {missing[0]!r} among them; download it again"
        )
    check_finite(f"the model {path}", model)
    return model


def load_processor(path: str):
    """The processor of a folder or a name of the hub, which scales pictures as :func:`scale_by_pillow` says.

    Raises:
        ValueError: if it cannot be loaded.
    """
    try:
        processor = AutoProcessor.from_pretrained(path)
        scale_by_pillow(processor, path)
    except (OSError, ImportError, ValueError, KeyError) as error:
        raise ValueError(f"the processor of {path} cannot be loaded: {first_line(error)}") from error
    return processor


def scale_by_pillow(processor, path: str) -> None:
    """Give a processor the image processor of its checkpoint that scales with Pillow, as in the training of
    these checkpoints. (Its own argument for that fails where it also takes videos.)"""
    processor.image_processor = AutoImageProcessor.from_pretrained(path, backend="pil")


def pad_left(tokenizer) -> None:
    """Have batches padded as generation needs it, by the end token where there is none for padding."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def pad_by_end(model) -> None:
    """Have ``generate`` pad by an end token where the model names none for padding, instead of warning."""
    config = model.generation_config
    if config.pad_token_id is None:
        ends = config.eos_token_id
        config.pad_token_id = ends[0] if isinstance(ends, list) else ends


def check_folder(folder: Path) -> None:
    """What :func:`load` says of a folder, without loading it. Raises ValueError."""
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(
            f"the model {folder} cannot be loaded: it has no config.json; give a checkpoint's folder"
        )
    values, stored = read_json(path), stored_in(folder)
    check_sizes(path, values)
    check_depth(path, values, stored)
    if "quantization_config" in values:  # packed weights have types of their own
        return
    for name, weight in stored.items():
        if name.endswith((".weight", ".bias")):
            check_dtype(name, weight)
