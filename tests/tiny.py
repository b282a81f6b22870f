"""Tiny random models and ragged batches for the engine's tests, and a way to watch it while it compresses."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
)
from transformers import LlavaConfig as HFLlavaConfig
from transformers.generation import GenerationMixin

from libra.engine.tokens import Shortened, VisualTokens
from libra.step import Compressed
from llava.model import LlavaConfig, LlavaLlamaForCausalLM

VOCABULARY = 100
IMAGE = 90  # the placeholder id of the Hugging Face models
IMAGE_TOKENS = 16  # visual tokens of one of their images
WIDTH = 32

# Weights larger than usual: attention is far from uniform and near-ties are rare. No end token: answers have
# a fixed length.
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    intermediate_size=2 * WIDTH,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)


def llava_model(layers: int = 6, attention: str = "sdpa", seed: int = 0, **sizes) -> LlavaLlamaForCausalLM:
    """llava's own driver without a vision tower: it takes embeddings and says with ``visual_mask`` which are
    visual tokens."""
    torch.manual_seed(seed)
    config = LlavaConfig(**{**SIZES, "num_hidden_layers": layers, **sizes})
    return LlavaLlamaForCausalLM._from_config(config, attn_implementation=attention).eval()


def hf_model(
    layers: int = 6, text: str = "llama", attention: str = "sdpa", seed: int = 0
) -> LlavaForConditionalGeneration:
    """A stock Hugging Face LLaVA of 56-pixel images."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        projection_dim=16,
        initializer_range=0.2,
    )
    family = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}[text]
    sizes = {**SIZES, "num_hidden_layers": layers, **({"sliding_window": None} if text == "mistral" else {})}
    config = HFLlavaConfig(
        vision_config=vision,
        text_config=family(**sizes),
        image_token_id=IMAGE,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    config.initializer_range = 0.2
    return LlavaForConditionalGeneration._from_config(config, attn_implementation=attention).eval()


@dataclass
class Row:
    """One sample: embeddings (S, D), which of them are visual tokens (S,), labels (S,) with -100 outside the
    answers."""

    embeds: torch.Tensor
    visual: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.visual)


def row(pattern: str, seed: int, alike: float = 0.0) -> Row:
    """A sample from a pattern such as "t3 v16 t5 a2": lengths of text, images (runs of visual tokens) and
    supervised answers.

    ``alike`` in [0, 1) makes the visual tokens similar to each other: 0 not at all.
    """
    draw = torch.Generator().manual_seed(seed)
    common, embeds, visual, labels = torch.randn(WIDTH, generator=draw), [], [], []
    for part in pattern.split():
        kind, length = part[0], int(part[1:])
        noise = torch.randn(length, WIDTH, generator=draw)
        embeds.append(alike * common + (1 - alike) * noise if kind == "v" else noise)
        visual.append(torch.full((length,), kind == "v"))
        answers = torch.randint(3, IMAGE, (length,), generator=draw)
        labels.append(answers if kind == "a" else torch.full((length,), -100))
    return Row(torch.cat(embeds), torch.cat(visual), torch.cat(labels))


def collate(rows: list[Row], side: str = "right", labels: bool = False) -> dict[str, torch.Tensor]:
    """The model's arguments for a batch of rows, padded on one side with noise that must not matter."""

    def padded(parts, value):
        return pad_sequence(parts, batch_first=True, padding_value=value, padding_side=side)

    mask = padded([torch.ones(len(r), dtype=torch.long) for r in rows], 0)
    embeds = padded([r.embeds for r in rows], 7.0)
    batch = {
        "inputs_embeds": embeds,
        "attention_mask": mask,
        "visual_mask": padded([r.visual for r in rows], False),
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }
    if labels:
        batch["labels"] = padded([r.labels for r in rows], -100)
    return batch


def alone(r: Row) -> dict[str, torch.Tensor]:
    """The model's arguments for one row without padding: no mask, no positions."""
    return {"inputs_embeds": r.embeds[None], "visual_mask": r.visual[None]}


def own(values: torch.Tensor, length: int, side: str) -> torch.Tensor:
    """The valid part of one row of a padded batch: its first or its last ``length`` columns."""
    return values[-length:] if side == "left" else values[:length]


def generate(model: LlavaLlamaForCausalLM, arguments: dict, tokens: int = 5, **options):
    """transformers' generate on embeddings (``llava``'s own takes token ids only)."""
    arguments = {k: v for k, v in arguments.items() if k not in ("labels", "position_ids")}
    options = {"do_sample": False, **options}
    return GenerationMixin.generate(model, **arguments, max_new_tokens=tokens, **options)


@dataclass
class Step:
    """One call of :meth:`VisualTokens.compress`, as it was seen from outside."""

    attention: torch.Tensor  # (B, R, S)
    visual: torch.Tensor  # (B, S) bool, before the step
    queries: torch.Tensor  # (B, R), before the step
    shortened: Shortened
    outcome: Compressed

    def scores(self, b: int = 0) -> torch.Tensor:
        """α of row b's visual tokens, as the first query gives it."""
        return self.attention[b, 0][self.visual[b]]

    def targets(self, b: int = 0) -> list[int]:
        """Row b's target tokens."""
        return self.outcome.targets[b][self.outcome.layout.target_valid[b]].tolist()


@contextmanager
def watched() -> Iterator[list[Step]]:
    """Collects every compression step that is made inside the block."""
    steps, compress = [], VisualTokens.compress

    def spy(tokens, hidden, attention):
        visual, queries = tokens.spans > 0, tokens.queries.columns
        if isinstance(queries, range):
            queries = torch.arange(queries.start, queries.stop).expand(len(visual), -1)
        result = compress(tokens, hidden, attention)
        steps.append(Step(attention, visual, queries, *result[1:]))
        return result

    VisualTokens.compress = spy
    try:
        yield steps
    finally:
        VisualTokens.compress = compress


def kept_of_original(steps: list[Step], b: int = 0) -> list[list[int]]:
    """After each step, the numbers that row b's target tokens had before the first one."""
    kept, now = [], None
    for step in steps:
        now = step.targets(b) if now is None else [now[j] for j in step.targets(b)]
        kept.append(now)
    return kept
