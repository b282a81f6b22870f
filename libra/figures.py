"""The paper's Figures 1 and 2 of a real prefill, on its image: python -m libra.figures --model PATH --image FILE …"""

import argparse
import io
from collections.abc import Mapping, Sequence
from math import isqrt
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig

from .attach import attach
from .cli import Parser
from .config import Compression
from .drawing import Block, Record, draw, figure_class, strip
from .files import write_bytes
from .media import COMMAND, open_image

EXAMPLES = """examples:
  python -m libra.figures --model llava-hf/llava-1.5-7b-hf --image street.jpg --prompt "How many cars are there?" \\
      --config configs/llava7b_r50.yaml --output tokens.png --save-trace trace.json
  python -m libra.figures --from-trace trace.json --output tokens.svg

A checkpoint in LLaVA's own format is converted first: python -m llava.convert mini/checkpoint mini-hf"""

FORMATS = (".png", ".svg", ".pdf")
LONG_SIDE = 1024  # pixels of a picture in a figure or a trace file, at most


def blocks_of(inputs: Mapping, image: Image.Image, spans: Sequence[int], processor, config) -> list[Block]:
    """Where the visual tokens of one image lie, as far as the processor's ``inputs`` tell; else a strip for each span.

    A place is told only where the number of tokens is exactly the one that it leads to.
    """
    tokens, whole = sum(spans), image.copy()
    whole.thumbnail((LONG_SIDE, LONG_SIDE))
    pixels = inputs.get("pixel_values", inputs.get("pixel_values_images"))
    blocks: list[Block] = []
    if inputs.get("image_grid_thw") is not None:  # Qwen: the whole image, at its own shape
        (_, rows, columns), merge = inputs["image_grid_thw"][0].tolist(), processor.image_processor.merge_size
        blocks = [Block(rows * columns // merge**2, columns // merge, whole)]
    elif pixels is not None and pixels.ndim == 4 and pixels.shape[-1] == pixels.shape[-2]:  # one square, or tiles
        side = max(1, isqrt(tokens // len(pixels)))
        blocks = [Block(side * side, side, _seen(square, processor)) for square in pixels]
    elif pixels is not None and pixels.ndim == 5:  # an overview, then the whole image from its tiles
        blocks = _overview_and_tiles(inputs, whole, processor, config)
    return blocks if sum(block.tokens for block in blocks) == tokens else [strip(span) for span in spans]


def _overview_and_tiles(inputs: Mapping, whole: Image.Image, processor, config) -> list[Block]:
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    edge = config.vision_config.image_size
    side, size = edge // config.vision_config.patch_size, inputs["image_sizes"][0].tolist()
    down, across = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, edge)
    rows, columns = unpad_image(torch.empty(1, side * down, side * across), size).shape[1:]
    overview = Block(side * side, side, _seen(inputs["pixel_values"][0, 0], processor))
    return [overview, Block(rows * (columns + 1), columns, whole, newline=True)]


def _seen(pixels: torch.Tensor, processor) -> Image.Image:
    """The picture behind normalised pixels (3, H, W)."""
    mean, std = (torch.tensor(getattr(processor.image_processor, name)) for name in ("image_mean", "image_std"))
    values = pixels.float().cpu() * std[:, None, None] + mean[:, None, None]
    return Image.fromarray((values.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def trace_image(model, processor, compression: Compression, image: Image.Image, prompt: str) -> Record:
    """One prefill of a Hugging Face model with compression attached, and what became of the image's tokens.

    Raises:
        ValueError: if the model is not supported or the compression does not fit it.
    """
    if getattr(processor, "chat_template", None):
        content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )
    else:
        text = prompt if processor.image_token in prompt else f"{processor.image_token}\n{prompt}"
        inputs = processor(images=[image], text=[text], return_tensors="pt")
    inputs = inputs.to(model.device, model.dtype)
    with attach(model, compression, trace=True) as handle, torch.no_grad():
        model(**inputs)
    trace = handle.trace[0]
    return Record(trace, compression, tuple(blocks_of(inputs, image, trace.spans, processor, model.config)))


def _load(path: str):
    """A model and its processor. Raises ValueError."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if "mm_vision_tower" in PreTrainedConfig.get_config_dict(path)[0]:
            raise ValueError("it is in LLaVA's own format; convert it with python -m llava.convert")
        processor = AutoProcessor.from_pretrained(path)
        return AutoModelForImageTextToText.from_pretrained(path, dtype="auto").to(device).eval(), processor
    except (OSError, ImportError, ValueError, KeyError) as error:
        raise ValueError(f"the model {path} cannot be loaded: {str(error).splitlines()[0]}") from error


def _save(figure, path: Path, dpi: int) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:].lower(), dpi=dpi)
    write_bytes(path, buffer.getvalue())


def _parser() -> Parser:
    parser = Parser(
        prog="python -m libra.figures", epilog=EXAMPLES,
        description="Draw on an image which of its visual tokens each compression layer kept and where the others went.",
    )
    parser.add_argument("--model", metavar="PATH_OR_HUB", help="a model in Hugging Face's format that libra.attach supports")
    parser.add_argument("--image", metavar="FILE")
    parser.add_argument("--prompt", metavar="TEXT", help="the question; the chat template adds the image and the rest")
    parser.add_argument("--config", metavar="FILE", help="the compression: a row's YAML file or one with its keys alone")
    parser.add_argument("--from-trace", metavar="FILE", help="draw a trace of --save-trace, without a model")
    parser.add_argument("--save-trace", metavar="FILE", help="also write the trace, with the picture, as JSON")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help=f"the figure: {', '.join(FORMATS)}")
    parser.add_argument("--dpi", type=int, default=130, help="pixels of an inch, for .png (default %(default)s)")
    return parser


def _record(args: argparse.Namespace) -> Record:
    """From the arguments. Raises ValueError."""
    needed = {name: getattr(args, name) for name in ("model", "image", "prompt", "config")}
    if args.from_trace:
        given = [name for name in needed if needed[name] is not None]
        if given or args.save_trace:
            raise ValueError(f"--from-trace draws a file as it is; leave out --{(given or ['save-trace'])[0]}")
        return Record.load(args.from_trace)
    missing = [f"--{name}" for name, value in needed.items() if value is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing; give a model, an image, a prompt and a configuration, or --from-trace")
    compression, image = Compression.from_yaml(args.config), open_image(args.image, COMMAND)
    if not compression.layers:
        raise ValueError(f"{args.config} compresses nothing; give a configuration with compression layers")
    return trace_image(*_load(args.model), compression, image, args.prompt)


def main(argv: list[str] | None = None) -> int:
    """The command line; 0 on success, SystemExit with status 2 after one `error: …` line."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        if args.output.suffix.lower() not in FORMATS:
            raise ValueError(f"--output: {args.output} must end in {', '.join(FORMATS)}")
        if args.dpi < 1:
            raise ValueError(f"--dpi: {args.dpi} is no resolution; give for example 130")
        figure_class()
        record = _record(args)
        figure = draw(record)
        if args.save_trace:
            record.save(args.save_trace)
        _save(figure, args.output, args.dpi)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
