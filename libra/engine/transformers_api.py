"""The installed transformers, in one language.

What differs between the versions in :data:`RANGE` is known in this module only, and what is used of
transformers' internals is imported from here. Everything else says ``cache``, as transformers does since
5.24. Before, the keyword and the field of outputs were ``past_key_values``. 5.24 still takes that name, with
a warning, and ignores it where both names are given.

Importing this module raises :class:`WrongTransformers` where transformers is missing or not in :data:`RANGE`.
"""

import inspect
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

RANGE = ">=5.17,<5.25"  # setup.py has the same; docs/versions.md says which versions were tested


class WrongTransformers(ImportError, ValueError):
    """In one sentence; a ValueError too, which every command prints as its one line."""


def _accepted_version() -> str:
    wanted = f"transformers{RANGE}"
    try:
        from transformers import __version__ as installed
    except ModuleNotFoundError:
        raise WrongTransformers(
            f"libra needs {wanted}, which is not installed; run: pip install '{wanted}'"
        ) from None
    if not SpecifierSet(RANGE).contains(installed, prereleases=True):
        raise WrongTransformers(
            f"libra needs {wanted}, but {installed} is installed; run: pip install '{wanted}'"
        )
    return installed


_INSTALLED = _accepted_version()  # before the imports that another version may not have

from transformers import (  # noqa: E402
    AttentionInterface,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import (  # noqa: E402
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    create_causal_mask,
)
from transformers.masking_utils import (  # noqa: E402
    LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING as MASKS_OF_LAYER_TYPES,
)
from transformers.modeling_layers import GradientCheckpointingLayer  # noqa: E402
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402
from transformers.utils import ModelOutput  # noqa: E402
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults  # noqa: E402
from transformers.utils.output_capturing import capture_outputs  # noqa: E402

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "ALL_MASK_ATTENTION_FUNCTIONS",
    "ASSISTED_GENERATION",
    "AttentionInterface",
    "AttentionMaskInterface",
    "BaseModelOutputWithPast",
    "CACHE",
    "CACHES",
    "CHECKPOINTS_CALLS",
    "Cache",
    "CausalLMOutputWithPast",
    "DynamicCache",
    "MASKS_OF_LAYER_TYPES",
    "ModelOutput",
    "PreTrainedConfig",
    "PreTrainedModel",
    "RANGE",
    "WrongTransformers",
    "cache_argument",
    "cache_given",
    "cache_of",
    "can_return_tuple",
    "capture_outputs",
    "check_guesses",
    "create_causal_mask",
    "empty_layers",
    "merge_with_config_defaults",
    "one_cache",
    "take_cache",
]

FORMER = "past_key_values"
ASSISTED_GENERATION = GenerationMixin._assisted_decoding.__code__  # what its frame runs
# Before 5.23 gradient checkpointing recomputes a layer's call with its hooks, since then its forward only.
CHECKPOINTS_CALLS = "__call__" in vars(GradientCheckpointingLayer)
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else FORMER
CACHES = (FORMER, CACHE)


def cache_argument(cache: Cache | None) -> dict[str, Any]:
    """The keyword argument by which transformers' models, layers, ``generate``, masks and outputs take a
    cache."""
    return {CACHE: cache}


def cache_given(arguments: dict) -> Cache | None:
    """Of a call of a transformers model, by its keyword arguments: the cache that the model will use."""
    return arguments[CACHE] if CACHE in arguments else arguments.get(FORMER)


def cache_of(output: ModelOutput) -> Cache | None:
    """The cache in the output of a model or of ``generate``."""
    return getattr(output, CACHE)


def empty_layers(cache: DynamicCache) -> None:
    """Remove all that a cache's layers hold. Before 5.19 their own ``reset`` sets it to zero and keeps its
    length."""
    for layer in cache.layers:
        layer.keys = layer.values = None
        layer.is_initialized = False
        layer.reset()


def check_guesses(options: dict) -> None:
    """Refuse the options of a ``generate`` from embeddings that the installed transformers gets wrong.

    Raises:
        ValueError: for assisted generation before 5.18, which gives other tokens than the model's own.
    """
    config = options.get("generation_config")
    lookup = options.get("prompt_lookup_num_tokens") or getattr(config, "prompt_lookup_num_tokens", None)
    if (lookup or options.get("assistant_model") is not None) and Version(_INSTALLED) < Version("5.18"):
        raise ValueError(
            f"assisted generation from embeddings gives wrong tokens with transformers {_INSTALLED}; take"
            " 5.18 or newer,"
            " or leave out assistant_model and prompt_lookup_num_tokens"
        )


def one_cache(first: Cache | None, second: Cache | None) -> Cache | None:
    """The cache of a call of ours that takes it by two names.

    Raises:
        ValueError: for two different ones.
    """
    if first is not None and second is not None and first is not second:
        raise ValueError(f"two caches were given, as `{FORMER}` and as `cache`; give one of them")
    return second if first is None else first


def take_cache(cache: Cache | None, arguments: dict) -> Cache | None:
    """The cache of a call whose parameter is called ``cache``; the former name is taken out of its other
    ``arguments``.

    Raises:
        ValueError: for two different ones.
    """
    return one_cache(arguments.pop(FORMER, None), cache)
