"""Models of true size without a checkpoint: random weights, made in seconds, after which activations stay
finite."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from ..rows import ModelSpec
from ..utils.sentences import first_line

PERIOD = (
    1_000_003  # a prime, so that a matrix whose rows are cut out of a block this long has no two equal rows
)
HEAD = (
    128  # head size of every model of the registry but the embedded one, for which it makes one head of four
)
VOCABULARY = 256  # measuring needs few token ids, and a large head would be timed with the decoder
CLIP_L_336 = dict(  # the vision tower of the LLaVA models, CLIP ViT-L/14 at 336 pixels: 576 patches
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
    projection_dim=768,
)
NO_TOWER = dict(
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    image_size=14,
    patch_size=14,
)


class RandomWeights:
    """A block of unit normal numbers that fills tensor after tensor: drawing 7 billion numbers would take
    minutes.

    Args:
        dtype, device: of the tensors to fill.
        seed: of the block.
    """

    def __init__(self, dtype: torch.dtype, device="cpu", seed: int = 0):
        block = torch.randn(PERIOD, generator=torch.Generator().manual_seed(seed))
        self._block, self._filled = block.to(device, dtype), 0

    @torch.no_grad()
    def fill(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Fill a contiguous tensor in place: a matrix (out, in, …) with deviation 1/√in, a vector with 1, a
        bias with 0."""
        if tensor.ndim < 2:
            return tensor.fill_(0.0 if name.endswith("bias") else 1.0)
        self._filled += 1
        block = (
            self._block.roll(self._filled * 7919) * math.prod(tensor.shape[1:]) ** -0.5
        )  # no two tensors are equal
        for piece in tensor.view(-1).split(PERIOD):
            piece.copy_(block[: len(piece)])
        return tensor

    def fill_all(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in named:
            self.fill(name, tensor)


def random_model(
    spec: ModelSpec,
    layers: int,
    dtype: torch.dtype,
    device="cpu",
    attention: str = "sdpa",
    tower: dict | None = None,
) -> LlavaForConditionalGeneration:
    """A Hugging Face LLaVA with the first ``layers`` layers of a model's true sizes, in evaluation mode.

    The vocabulary has :data:`VOCABULARY` tokens. ``tower``: the sizes of a CLIP vision tower; without them
    the model is only the decoder, and vision tower and projector are empty.

    Raises:
        ValueError: if the attention implementation is not there.
    """
    heads, kv_heads = spec.hidden_size // HEAD, spec.kv_size // HEAD
    text = LlamaConfig(
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=VOCABULARY,
        max_position_embeddings=32768,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=CLIPVisionConfig(**(tower or NO_TOWER)),
        image_token_id=VOCABULARY - 1,  # type: ignore[call-arg]  # an attribute map takes it
        image_seq_length=1,
    )
    try:
        with torch.device("meta"):
            model = LlavaForConditionalGeneration._from_config(
                config, dtype=dtype, attn_implementation=attention
            )
    except ImportError as error:
        raise ValueError(f"attention {attention} is not installed: {first_line(error)}") from error
    if tower is None:
        model.model.vision_tower, model.model.multi_modal_projector = nn.Identity(), nn.Identity()
    model.to_empty(device=device)
    decoder = model.model.language_model
    decoder.rotary_emb = type(decoder.rotary_emb)(decoder.config).to(device)  # its tables are no weights
    for name, numbers in model.named_buffers():
        if name.endswith("position_ids"):  # the tower's
            numbers.copy_(torch.arange(numbers.shape[-1]))
    RandomWeights(dtype, device).fill_all(model.named_parameters())
    return model.eval()


def weight_bytes(spec: ModelSpec, layers: int, dtype: torch.dtype) -> int:
    """What the layers' matrices take in memory."""
    d, m, kv = spec.hidden_size, spec.intermediate_size, spec.kv_size
    return layers * (2 * d * d + 2 * d * kv + 3 * d * m) * dtype.itemsize
