"""LoRA adapters in the original's layout: ``adapter_config.json`` and ``adapter_model`` next to
``non_lora_trainables.bin``."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from libra.utils.sentences import first_line

from .weights import ADAPTERS, Stored, read_json, read_shapes

CONFIG = "adapter_config.json"
_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


def _peft():
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"a LoRA checkpoint needs peft ({error}); install it: pip install peft") from error
    return peft


def check_adapter(folder: Path, expected: Mapping[str, torch.Tensor]) -> dict[str, Stored]:
    """The adapter's weights, after a look at whether they fit a model with the state dict ``expected``.

    Raises:
        ValueError: if files are missing or damaged, the adapter is none of LoRA's or was made for another
            model, or peft is not installed.
    """
    _peft()
    kind = read_json(folder / CONFIG).get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{folder / CONFIG} describes a {kind!r} adapter; only LORA is supported")
    file = next((folder / name for name in ADAPTERS if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"{folder} lacks the adapter's weights ({' or '.join(ADAPTERS)}); download them")
    adapter = read_shapes(file)
    factors = [match for name in adapter if (match := _FACTOR.fullmatch(name))]
    if not factors:
        raise ValueError(
            f"{file} holds no LoRA weights (base_model.model.….lora_A.weight); download it again"
        )
    for factor in factors:
        weight = expected.get(f"{factor['module']}.weight")
        if weight is None:
            raise ValueError(
                f"{file} adapts {factor['module']!r}, which this model does not have; give the adapter's own"
                " base"
            )
        out, inner = weight.shape
        fits = (
            adapter[factor[0]].shape[1:] == (inner,)
            if factor["side"] == "A"
            else adapter[factor[0]].shape[:1] == (out,)
        )
        if not fits:
            raise ValueError(
                f"{file} holds {factor[0]!r} in the shape {adapter[factor[0]].shape}, which does not fit a "
                f"weight of {out} x {inner}; give the adapter's own base"
            )
    return adapter


def add_adapter(model, folder: Path, adapter: Mapping[str, Stored], merge: bool):
    """``model`` with the adapter in ``folder``: W + (α/r)·B·A in its weights, or next to them in peft's
    wrapper.

    Args:
        adapter: what :func:`check_adapter` returned.
        merge: True gives the model itself, False a ``PeftModel`` around it, whose adapter can be switched
            off.

    Raises:
        ValueError: if peft cannot make anything of the adapter, or weights that its configuration asks for
            are missing.
    """
    peft = _peft()
    try:
        settings = peft.PeftConfig.from_pretrained(str(folder))
        has_tower = any("vision_tower" in name for name, _ in model.named_parameters())
        if has_tower and not any("vision_tower" in name for name in adapter):
            # Its layers are named like the decoder's, and only those are meant.
            settings.exclude_modules = r".*\bvision_tower\b.*"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on what is missing, which is an error here
            wrapped = peft.PeftModel.from_pretrained(model, str(folder), config=settings)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"peft cannot load the adapter in {folder}: {first_line(error)}") from error
    missing = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False).keys() - adapter.keys()
    if missing:
        raise ValueError(f"the adapter in {folder} lacks {len(missing)} weights, {min(missing)!r} among them")
    return wrapped.merge_and_unload() if merge else wrapped
