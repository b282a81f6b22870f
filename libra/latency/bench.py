"""One model on one prompt: a prefill, plain or compressed, timed or counted."""

import inspect
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..config import Compression, ConfigError
from ..engine.attach import attach
from ..engine.transformers_api import DynamicCache, ModelOutput, cache_argument, cache_of
from ..rows import patches_across
from ..utils.timing import Moment, now
from .memory import LiveBytes, Step, watch_compression, watch_layer
from .vision import reads_tower


def scale_layers(c: Compression, of: int, layers: int) -> Compression:
    """A compression of a model of ``of`` layers for a slice of ``layers``, each step at the same fraction of
    the depth.

    A step after layer L leaves (L+1)/of of the depth on the longer sequence: 7, 15, 23 of 32 become 1, 3, 5
    of 8.

    Raises:
        ConfigError: where two steps would fall on one layer, or one before the first.
    """
    if c.steps is not None:
        return Compression(
            steps=tuple(scale_layers(part, of, layers) for part in c.steps), positions=c.positions
        )
    if c.at is not None:
        return c  # before the first layer, whatever the depth
    c = c.at_depth(of)
    scaled = [round((layer + 1) * layers / of) - 1 for layer in c.layers]
    if len(set(scaled)) < len(scaled) or min(scaled, default=0) < 0:
        raise ConfigError(
            f"layers: {list(c.layers)} of {of} have no places of their own in {layers} layers;"
            " take more --layers, or name them with --compression-layers"
        )
    return replace(c, layers=tuple(scaled))


@dataclass(frozen=True)
class Prompt:
    """``batch`` rows of ``text`` text tokens around pictures of ``visual`` tokens each.

    ``images`` says how many pictures a row has, row after row and over and over: (0, 1, 2) is a batch of all
    three kinds, whose shorter rows are padded on the left.
    """

    visual: int
    text: int = 64
    batch: int = 1
    images: tuple[int, ...] = (1,)

    @cached_property
    def pictures(self) -> list[int]:
        """Of each row."""
        return [self.images[row % len(self.images)] for row in range(self.batch)]

    @property
    def length(self) -> int:
        """Columns of the batch."""
        return self.text + max(self.pictures) * self.visual

    def places(self) -> torch.Tensor:
        """(B, S) bool, True at the visual tokens: half of the text before them, one text token between two
        pictures."""
        places = torch.zeros(self.batch, self.length, dtype=torch.bool)
        for row, count in enumerate(self.pictures):
            start = self.length - self.text - count * self.visual + self.text // 2
            for _ in range(count):
                places[row, start : start + self.visual] = True
                start += self.visual + 1
        return places

    def mask(self) -> torch.Tensor | None:
        """(B, S), 0 for padding; None where the rows are of one length."""
        if len(set(self.pictures)) == 1:
            return None
        lengths = torch.tensor([self.text + count * self.visual for count in self.pictures])
        return (torch.arange(self.length) >= self.length - lengths[:, None]).long()

    def check(self) -> "Prompt":
        """Itself. Raises ConfigError where no row has a picture, or the text does not reach around them."""
        if not max(self.pictures):
            raise ConfigError(f"--images: none of the {self.batch} rows has a picture; give one a 1")
        if max(self.pictures) > self.text // 2:
            raise ConfigError(
                f"{self.text} text tokens do not reach around {max(self.pictures)} pictures; give more"
                " --text-tokens"
            )
        return self


class Run(NamedTuple):
    """Seconds of one prefill, of a decoding step after it, and of the vision tower before it; None for what
    was not run."""

    prefill: Moment
    token: float | None = None
    vision: Moment | None = None


@dataclass(frozen=True)
class Counted:
    """What one prefill takes, counted and not timed.

    Attributes:
        operations: multiply-accumulates of the decoder stack.
        cache: bytes of its KV cache.
        layer: peak bytes of the first compression layer's own forward, in the plain model; 0 in the
            compressed one.
        steps: bytes of each compression step, none in the plain model.
    """

    operations: int
    cache: int
    layer: int
    steps: tuple[Step, ...]

    @property
    def peak(self) -> int:
        """The most bytes that one of the compression steps holds."""
        return max(step.whole.peak for step in self.steps)


class Bench:
    """A Hugging Face LLaVA, plain and compressed, on random text with random features in the image's place.

    Args:
        model: what :func:`libra.attach` supports, in evaluation mode.
        compression: for this very model, with layers.
        views: views of each picture for the vision tower, whose features go nowhere; 0 leaves it out.
        pictures: let the prompt's visual tokens be what the vision tower makes of random pictures. It runs
            before the prefill is timed, and a compression that reads it does so then. Such a compression
            always gets pictures.

    Raises:
        ConfigError: where the tower does not make ``prompt.visual`` tokens of a picture.
    """

    def __init__(
        self, model, compression: Compression, prompt: Prompt, views: int = 0, pictures: bool = False
    ):
        self.pictures = pictures or reads_tower(compression)
        views = 1 if self.pictures else views
        self.model, self.compression, self.prompt, self.views = model, compression, prompt, views
        self.text = model.config.get_text_config()
        embed, draw = model.get_input_embeddings(), torch.Generator().manual_seed(0)
        self.device = embed.weight.device
        self.places = prompt.check().places().to(self.device)
        mask = prompt.mask()
        self.mask = None if mask is None else mask.to(self.device)
        ids = torch.randint(1, self.text.vocab_size, self.places.shape, generator=draw)
        features = torch.randn(sum(prompt.pictures) * prompt.visual, embed.weight.shape[1], generator=draw)
        with torch.no_grad():
            self.embeds = embed(ids.to(self.device))  # (B, S, D)
            self.embeds[self.places] = features.to(embed.weight) * embed.weight.std()
        if self.pictures:
            check_pictures(model, prompt.visual)
            place = model.config.image_token_id
            text = ids.masked_fill(ids == place, 1).to(self.device)
            self.ids = text.masked_fill(self.places, place)
            self.features: ModelOutput | None = None  # of the last look of the tower
        if views:
            size = model.config.vision_config.image_size
            self.pixels = torch.randn(sum(prompt.pictures) * views, 3, size, size, generator=draw).to(
                embed.weight
            )
        self.stats: dict | None = None  # of the last compressed prefill

    @contextmanager
    def mode(self, compressed: bool):
        """A block in which the model is the compressed one, or the plain one."""
        if not compressed:
            yield
            return
        with attach(self.model, self.compression) as handle:
            if not self.pictures:
                handle.mark_visual_tokens(self.places)
            yield
            self.stats = handle.stats

    def prefill(self) -> tuple[ModelOutput, Moment]:
        """One prefill, the only one of a :meth:`mode` block: its output and its seconds. With pictures after
        :meth:`see`."""
        with torch.inference_mode():
            start = now(self.device)
            output = self.call(self.new_cache())
            return output, now(self.device).since(start)

    def _prompt(self) -> dict:
        if not self.pictures:
            return {"inputs_embeds": self.embeds}
        return {"input_ids": self.ids, "mm_encoder_outputs": {"image": self.features}}

    def new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.text)

    def call(self, cache: DynamicCache) -> ModelOutput:
        """One prefill into an empty cache. With pictures after :meth:`see`."""
        return self._call(cache, self.mask, **self._prompt())

    def _call(self, cache, mask, **given):
        return self.model(
            **cache_argument(cache), attention_mask=mask, use_cache=True, logits_to_keep=1, **given
        )

    @torch.inference_mode()
    def decode(self, output, steps: int) -> float:
        """Seconds a decoding step, greedy, after a prefill."""
        mask, start = self.mask, now(self.device)
        for _ in range(steps):
            mask = None if mask is None else torch.nn.functional.pad(mask, (0, 1), value=1)
            output = self._call(cache_of(output), mask, input_ids=output.logits[:, -1:].argmax(-1))
        return now(self.device).since(start).wall / steps

    @torch.inference_mode()
    def see(self) -> Moment:
        """Seconds of the vision tower and the projector on the prompt's pictures."""
        start = now(self.device)
        features = self.model.get_image_features(pixel_values=self.pixels)
        seconds = now(self.device).since(start)
        if self.pictures:
            self.features = features
        return seconds

    def run(self, compressed: bool, steps: int = 0) -> Run:
        """One answer's way: vision where the bench has pictures, prefill, ``steps`` decoding steps."""
        with self.mode(compressed):
            vision = self.see() if self.views else None
            output, seconds = self.prefill()
            return Run(seconds, self.decode(output, steps) if steps else None, vision)

    def count(self, compressed: bool) -> Counted:
        """One prefill, counted operation by operation."""
        flops = FlopCounterMode(
            display=False, custom_mapping={_CPU_ATTENTION: _attention_flops} if _CPU_ATTENTION else {}
        )
        meter, decoder = LiveBytes(self.device), self.model.get_decoder()
        watch: Callable = watch_compression if compressed else watch_layer
        # Not in inference mode, where torch hands composite operations over whole, with all that they
        # allocate inside.
        with torch.no_grad(), self.mode(compressed):
            if self.pictures:
                self.features = self.model.get_image_features(pixel_values=self.pixels)
            layers = [step.layer for step in self.compression.schedule(self.text.num_hidden_layers)]
            with meter, watch(meter, decoder, list(dict.fromkeys(layers))) as seen, flops:
                output = self.call(self.new_cache())
        head = 2 * output.logits.shape[0] * self.text.hidden_size * self.text.vocab_size
        tables = [table for layer in cache_of(output).layers for table in (layer.keys, layer.values)]
        return Counted(
            (flops.get_total_flops() - head) // 2,
            sum(table.nbytes for table in tables),
            layer=0 if compressed else seen[0].peak,
            steps=tuple(seen) if compressed else (),
        )


def check_pictures(model, visual: int) -> None:
    """Raises ConfigError where a picture is not ``visual`` tokens, or its features cannot be handed over."""
    vision = getattr(model.config, "vision_config", None)
    made = 0 if vision is None else patches_across(vision) ** 2
    if made != visual:
        raise ConfigError(
            f"--visual-tokens: this compression reads the vision tower, which makes {made} tokens of a"
            f" picture and not {visual}; give {made}"
        )
    if "mm_encoder_outputs" not in inspect.signature(type(model).forward).parameters:
        raise ConfigError(
            "a compression that reads the vision tower is measured with a newer transformers, whose models"
            " take a picture's features (mm_encoder_outputs); upgrade it"
        )


# Not every version of torch counts the attention that runs on a CPU.
_CPU_ATTENTION = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def _attention_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    """Of scores and values, for every query, seen by the causal mask or not; the arguments are shapes (B, H,
    N, D)."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])
