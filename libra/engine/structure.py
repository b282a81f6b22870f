"""Whether a model can be compressed between its layers: where its decoder is, and what its layers take.

Everything that could only go wrong later is refused here, in one sentence.
"""

import inspect
import sys
import warnings
from dataclasses import dataclass

import torch

from ..config import Compression, Step
from .families import FINAL_NORMS, IMAGE_IDS, LAYER_ARGUMENTS, STREAMS, TESTED, VIDEO_IDS
from .masks import MASKS, WITHOUT_SCORES, attention_kinds
from .transformers_api import GenerationMixin, PreTrainedModel


@dataclass(frozen=True)
class Structure:
    """Where a model keeps what the hooks need.

    Attributes:
        base: the model itself, without an adapter around it.
        body: the module that puts text and images together; it takes ``input_ids``.
        decoder: the text model, with its ``layers``.
        token_ids: the placeholder ids of visual tokens.
    """

    base: PreTrainedModel
    body: torch.nn.Module
    decoder: torch.nn.Module
    token_ids: list[int]

    @property
    def name(self) -> str:
        """The model's class."""
        return type(self.base).__name__


def base_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model in an adapter of peft, or the model itself."""
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return model.get_base_model()
    return model


def placeholder_ids(config, names: tuple[str, ...] = IMAGE_IDS + VIDEO_IDS) -> list[int]:
    """The ids by which a configuration marks the places of visual tokens; some keep them with the tower's."""
    for part in (config, getattr(config, "vision_config", None)):
        ids = {token for name in names if isinstance(token := getattr(part, name, None), int)}
        if ids:
            return sorted(ids)
    return []


def earliest_place(config) -> int:
    """The first layer after which a model's decoder adds no more features of the picture; -1 where it adds
    none."""
    vision = getattr(config, "vision_config", None)
    after = len(getattr(vision, "deepstack_visual_indexes", None) or ()) - 1
    # Granite 4 Vision adds them before these layers.
    before = [layer for _, layer in getattr(config, "deepstack_layer_map", None) or ()]
    before += getattr(config, "spatial_target_layers", None) or ()
    return max(after, max(before, default=0) - 1)


def layers_of(decoder) -> list[torch.nn.Module]:
    """The layers that a decoder runs."""
    return list(decoder.layers)[: decoder.config.num_hidden_layers]


def final_norm(decoder) -> torch.nn.Module:
    """The norm of a decoder between its last layer and the head.

    Raises:
        ValueError: where it has none by a name that is known.
    """
    for name in FINAL_NORMS:
        norm = getattr(decoder, name, None)
        if isinstance(norm, torch.nn.Module):
            return norm
    raise ValueError(
        f"{type(decoder).__name__} has no final norm by a name that libra knows ({', '.join(FINAL_NORMS)})"
    )


def position_axes(decoder) -> int:
    """How many position numbers a token has: 3 with multi-axis rotary embeddings (time, height, width),
    otherwise 1."""
    return 3 if hasattr(getattr(decoder, "rotary_emb", None), "mrope_section") else 1


def arguments_of(layer: torch.nn.Module) -> list[str]:
    """The names of the arguments of a decoder layer, the hidden states first."""
    return list(inspect.signature(type(layer).forward).parameters)[1:]


def is_dense(config) -> bool:
    """True for a decoder whose layers all are an attention and one feed-forward network of one size, as the
    formula of FLOPs has it."""
    experts = (
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
        "moe_num_experts",
        "num_experts_per_tok",
    )
    return (
        not getattr(config, "is_heterogeneous", False)
        and WITHOUT_SCORES.isdisjoint(attention_kinds(config)[: config.num_hidden_layers])
        and isinstance(getattr(config, "intermediate_size", None), int)
        and isinstance(getattr(config, "num_key_value_heads", None), int)
        and not any(getattr(config, name, None) for name in experts)
    )


def attention_modules(layer: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules of a decoder layer that call transformers' attention functions."""
    return [
        module
        for module in layer.modules()
        if "Attention" in type(module).__name__
        and hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS")
    ]


def scoring_layer(step: Step) -> int:
    """The layer whose attention scores the visual tokens for a compression."""
    return step.layer + (step.part.score_layer == "next")


def structure_of(model: PreTrainedModel) -> Structure:
    """Find decoder, body and placeholder ids of a model.

    Raises:
        ValueError: where one of them is missing, with the reason.
    """
    base = base_of(model)
    ids = placeholder_ids(base.config)
    if not ids:
        raise _unsupported(base, "its configuration names no placeholder of visual tokens")
    decoder = _decoder_of(base)
    body = getattr(base, "model", None)
    takes = () if body is None or body is decoder else inspect.signature(type(body).forward).parameters
    return Structure(base, body if "input_ids" in takes else base, decoder, ids)


def _unsupported(base, reason: str) -> ValueError:
    return ValueError(f"libra.attach does not support {type(base).__name__}: {reason}")


def _decoder_of(base) -> torch.nn.Module:
    text = base.config.get_text_config(decoder=True)
    if getattr(base.config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        raise _unsupported(base, "its images go to an encoder, not into the decoder's sequence")

    def is_stack(module) -> bool:
        layers = getattr(module, "layers", None)
        return isinstance(layers, torch.nn.ModuleList) and len(layers) == getattr(
            text, "num_hidden_layers", 0
        )

    decoder = base.get_decoder()
    if is_stack(decoder):
        return decoder
    stacks = [m for m in decoder.modules() if is_stack(m) and getattr(m, "config", None) is text]
    if len(stacks) != 1:
        raise _unsupported(base, f"it has {len(stacks)} stacks of text layers where one is needed")
    return stacks[0]


def fitted(decoder, compression: Compression) -> Compression:
    """The compression with its layers in this decoder, the natural ones where none are named.

    Raises ValueError for a layer that the decoder does not have, for positions that cannot be renumbered, and
    for a method that compares hidden states after a final norm where a layer does not give them.
    """
    compression = compression.at_depth(decoder.config.num_hidden_layers)
    if compression.positions != "original" and position_axes(decoder) > 1:
        raise ValueError(
            f"positions: {compression.positions} cannot renumber the multi-axis positions of "
            f"{type(decoder).__name__};"
            " add `positions: original`"
        )
    for part in compression.parts:
        if part.compares_keys:
            _check_final_norm(decoder, part.name)
    return compression


def _check_final_norm(decoder, name: str) -> None:
    """Raises ValueError where what leaves a layer cannot be made what the head would see, which the method
    ``name`` compares."""
    reads = f"{name} compares hidden states after the decoder's final norm"
    if any(getattr(decoder.config, streams, None) for streams in STREAMS):
        raise ValueError(
            f"{reads}, and the layers of {type(decoder).__name__} hand on several streams of them, which are"
            " joined after the last layer; choose another method"
        )
    try:
        final_norm(decoder)
    except ValueError as error:
        raise ValueError(f"{reads}, and {error}; choose another method") from None


def examined(model: PreTrainedModel, compression: Compression) -> tuple[Structure, Compression]:
    """The structure of a model and the compression with its layers in it.

    Raises:
        ValueError: for what cannot be compressed, in one sentence with the reason.
    """
    found = structure_of(model)
    _check_layers(found)
    _check_forward(found.decoder)
    compression = fitted(found.decoder, compression)
    _check_places(found, compression)
    _check_positions(found, compression)
    if found.name not in TESTED:
        warnings.warn(
            f"{found.name} is untested with libra.attach: its structure is one that can be compressed, but"
            " compare its answers before you rely on them",
            stacklevel=6,
        )
    return found, compression


def _check_layers(found: Structure) -> None:
    config = found.decoder.config
    if not isinstance(getattr(config, "num_hidden_layers", None), int):
        raise _unsupported(
            found.base, "the configuration of its decoder does not tell how many layers it has"
        )
    layers = layers_of(found.decoder)
    if "generate" in vars(type(found.base)) and _speaks_within(found):
        raise _unsupported(
            found.base, "its generate hands embeddings to its language model, which knows of no placeholders"
        )
    if any("cross" in name for layer in layers for name, _ in layer.named_children()):
        raise _unsupported(
            found.base,
            "its text looks at the images through cross-attention, so its layers have no visual tokens",
        )
    strange = sorted({name for layer in layers for name in arguments_of(layer)} - set(LAYER_ARGUMENTS))
    if strange:
        raise _unsupported(
            found.base, f"its decoder layers take {', '.join(strange)}, which nobody can shorten"
        )
    kinds = set(attention_kinds(config)[: len(layers)])
    if unknown := sorted(kinds - {*MASKS} - WITHOUT_SCORES):
        raise _unsupported(found.base, f"its decoder has layers of type {', '.join(unknown)}")


def _speaks_within(found: Structure) -> bool:
    """True where a module of the model can generate by itself, with the model's decoder in it."""
    within = (module for module in found.base.modules() if module is not found.base)
    return any(
        isinstance(module, GenerationMixin) and any(part is found.decoder for part in module.modules())
        for module in within
    )


def _check_forward(decoder) -> None:
    own = vars(decoder)
    replaced = "forward" in own and getattr(own["forward"], "__func__", None) is not type(decoder).forward
    if replaced and "_old_forward" not in own:
        raise ValueError(
            f"the forward of this model's {type(decoder).__name__} was replaced (by torch.compile?); attach "
            "first, then replace it"
        )


def _check_places(found: Structure, compression: Compression) -> None:
    """Compression layers must score, and nothing may want back what they removed."""
    decoder, config = found.decoder, found.decoder.config
    layers = layers_of(decoder)
    schedule = compression.schedule(len(layers)) if compression.compresses else ()
    kinds = attention_kinds(config)[: len(layers)]
    able = [
        i for i, layer in enumerate(layers) if kinds[i] not in WITHOUT_SCORES and attention_modules(layer)
    ]
    for step in schedule:
        if step.scores and scoring_layer(step) not in able:
            raise ValueError(
                f"layers: {scoring_layer(step)} of {found.name} has no attention whose scores could be read; "
                f"choose from {able}"
            )
        if step.part.score_layer == "next" and kinds[scoring_layer(step)] == "chunked_attention":
            raise ValueError(
                f"score_layer: next cannot read layer {scoring_layer(step)} of {found.name}, which attends "
                "by chunks;"
                " write score_layer: same"
            )
    earliest = earliest_place(found.base.config)
    if schedule and schedule[0].layer < earliest:
        raise ValueError(
            f"layers: {schedule[0].layer} is too early: {type(decoder).__name__} adds visual features after "
            f"its layers 0 to {earliest}; compress after layer {earliest} at the earliest"
        )
    shared = getattr(config, "num_kv_shared_layers", 0) or 0
    if shared and schedule:
        first = len(layers) - shared
        sources = [max(i for i in range(first) if kinds[i] == kind) for kind in {*kinds[first:]}]
        if schedule[-1].layer >= min(sources):
            raise ValueError(
                f"layers: {schedule[-1].layer} is too late: layers {first} and up of {found.name} use the "
                f"keys of layers {sorted(sources)}; compress after layer {min(sources) - 1} at the latest"
            )


def _check_positions(found: Structure, compression: Compression) -> None:
    """Positions of several axes are :func:`fitted`'s."""
    if not compression.compresses or compression.positions == "original":
        return
    rotary = getattr(found.decoder, "rotary_emb", None)
    takes = () if rotary is None else list(inspect.signature(type(rotary).forward).parameters)[1:]
    if len(takes) != 2:
        raise ValueError(
            f"positions: {compression.positions} needs one rotary embedding for all layers of "
            f"{type(found.decoder).__name__}; add `positions: original`"
        )
