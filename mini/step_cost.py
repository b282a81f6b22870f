"""What a training step costs with compression and without: forward and backward of the language model, in
turns."""

import multiprocessing
from dataclasses import asdict, dataclass
from statistics import median

import torch
from tqdm import tqdm

from libra import Compression
from libra.budget import actual
from libra.flops import layer_flops
from libra.utils.timing import now, one_thread, paired_ratio, peak_memory, run_warm_in_turns
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM


@dataclass(frozen=True)
class Sizes:
    """A decoder and what it reads: rows of one image and a text after it; ``layers`` of the compression."""

    name: str
    width: int
    inner: int
    depth: int
    heads: int
    visual: int
    text: int
    rows: int
    compressed: tuple[int, ...]

    def compression(self, base: Compression) -> Compression:
        """``base`` after this decoder's own layers."""
        return Compression.from_dict({**base.to_dict(), "layers": list(self.compressed)})

    def flops(self, compression: Compression) -> float:
        """Multiply-accumulates of all tokens, visual and text, in the decoder's layers."""
        counts = actual(compression, self.depth, [self.visual])
        return sum(layer_flops(n + self.text, self.width, self.inner, self.width) for n in counts)


# LLaVA-1.5-7B's proportions at an eighth of its width and a quarter of its depth, with its visual tokens; the
# embedded model.
MEASURED = (
    Sizes("8 layers × 512", 512, 1376, 8, 4, 576, 64, 1, (1, 3, 5)),
    Sizes("embedded, 12 layers × 128", 128, 352, 12, 4, 256, 40, 8, (2, 5, 8)),
)


def _model(sizes: Sizes) -> tuple[LlavaLlamaForCausalLM, dict]:
    torch.manual_seed(0)
    model = LlavaLlamaForCausalLM(
        LlavaConfig(
            vocab_size=256,
            hidden_size=sizes.width,
            intermediate_size=sizes.inner,
            num_hidden_layers=sizes.depth,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.heads,
            use_cache=False,
        )
    ).train()
    length = sizes.visual + sizes.text
    visual = torch.zeros(sizes.rows, length, dtype=torch.bool)
    visual[:, 8 : 8 + sizes.visual] = True
    labels = torch.full((sizes.rows, length), -100)
    labels[:, -sizes.text // 4 :] = 7
    return model, {
        "inputs_embeds": torch.randn(sizes.rows, length, sizes.width),
        "visual_mask": visual,
        "labels": labels,
    }


def _step(model, given) -> None:
    model(**given).loss.backward()
    model.zero_grad(set_to_none=True)


def _peak(sizes: Sizes, compression: Compression | None) -> int:
    """Bytes that a step needs on top of the weights, in a process of its own."""
    torch.set_num_threads(1)
    model, given = _model(sizes)
    model.set_compression(compression)
    resident = peak_memory(lambda: None, torch.device("cpu"))
    return peak_memory(lambda: _step(model, given), torch.device("cpu")) - resident


def _peaks(sizes: Sizes, compression: Compression) -> list[int]:
    """Of a step with all visual tokens and of a compressed one; memory that one has freed would hide what the
    other needs."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return pool.starmap(_peak, [(sizes, None), (sizes, compression)], chunksize=1)


def measure(sizes: Sizes, base: Compression, pairs: int) -> dict:
    """:func:`in_turns`, and the peak memory of the two steps."""
    return {
        **in_turns(sizes, base, pairs),
        "peak_bytes": _peaks(sizes, sizes.compression(base)),
    }


def in_turns(sizes: Sizes, base: Compression, pairs: int) -> dict:
    """Forward and backward of the language model, compressed against whole, in turns in this process, one
    thread."""
    compression = sizes.compression(base)
    model, given = _model(sizes)

    def seconds(chosen: Compression | None) -> float:
        model.set_compression(chosen)
        start = now(torch.device("cpu"))
        _step(model, given)
        return now(torch.device("cpu")).since(start).cpu

    ways = {"whole": lambda: seconds(None), "compressed": lambda: seconds(compression)}
    with one_thread(), tqdm(total=2 * (pairs + 1), desc=sizes.name, unit=" steps") as bar:
        runs = run_warm_in_turns(ways, pairs, lambda _: bar.update())
    return {
        "sizes": asdict(sizes),
        "pairs": pairs,
        "cpu_seconds": [median(run[name] for run in runs) for name in ways],
        "ratio": asdict(paired_ratio(runs, "compressed", "whole")),
        "flops_ratio": sizes.flops(compression) / sizes.flops(Compression(method="vanilla")),
    }
