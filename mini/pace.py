"""What an answer of the embedded model takes with compression and without: ``python -m mini.pace``.

Batch 1, one thread. The prefill is from picture and question to the first logits, tower included; a decoding
step is one token. Prints the plain model's milliseconds of CPU time, and the compressed one's as a share of
them with the interval of the median over the pairs. ``python -m libra.latency`` measures attached models.
"""

import sys

from libra.utils.cli import Parser, whole_from

STEPS = 16  # of decoding after each prefill


def measure(folder: str, row: str, dtype: str, pairs: int) -> dict:
    """Of ``prefill`` and ``decode``: the plain seconds and the ratio (:class:`~libra.utils.timing.Interval`),
    of the checkpoint in ``folder`` with the compression of ``row``; ``busy``: whether others had the
    processor."""
    from statistics import median

    import torch
    from tqdm import tqdm

    from libra.engine.transformers_api import cache_argument, cache_of
    from libra.lmms.models_llava import Llava
    from libra.mini.benchmark import scene_sample
    from libra.rows import Row
    from libra.utils.timing import Moment, now, one_thread, paired_ratio, run_warm_in_turns, was_busy
    from llava.mm_utils import process_images, tokenizer_image_token

    engine = Llava(folder, None, "cpu", getattr(torch, dtype))
    model, sample = engine.model, scene_sample("caption", 0)
    pixels = process_images([sample.image], engine.image_processor, model.config).to(model.dtype)
    prompt = f"<image>\n{sample.question}"
    ids = tokenizer_image_token(prompt, engine.tokenizer, return_tensors="pt")[None]
    compression = Row.from_yaml(row).compression

    @torch.inference_mode()
    def answer(chosen) -> dict[str, Moment]:
        model.set_compression(chosen)
        start = now(model.device)
        output = model(ids, images=pixels, use_cache=True, logits_to_keep=1)
        prefilled = now(model.device)
        for _ in range(STEPS):
            token = output.logits[:, -1:].argmax(-1)
            output = model(token, **cache_argument(cache_of(output)), use_cache=True, logits_to_keep=1)
        return {"prefill": prefilled.since(start), "decode": now(model.device).since(prefilled)}

    ways = {"plain": lambda: answer(None), "compressed": lambda: answer(compression)}
    with one_thread(), tqdm(total=2 * (pairs + 1), unit=" answers") as bar:
        runs = run_warm_in_turns(ways, pairs, lambda _: bar.update())
    found: dict = {"busy": was_busy([moments["prefill"] for run in runs for moments in run.values()])}
    for part, calls in (("prefill", 1), ("decode", STEPS)):
        seconds = [{mode: moments[part].cpu for mode, moments in run.items()} for run in runs]
        found[part] = {
            "plain": median(one["plain"] for one in seconds) / calls,
            "ratio": paired_ratio(seconds, "compressed", "plain"),
        }
    return found


def main(argv: list[str] | None = None) -> int:
    options = Parser(
        prog="python -m mini.pace",
        description="Prefill and decoding of the embedded model, compressed against plain, in turns.",
        epilog="example: python -m mini.pace --row mini/r67 --pairs 41",
    )
    options.add_argument("--checkpoint", default="mini/checkpoint", help="default %(default)s")
    options.add_argument("--row", default="mini/r50", help="whose compression (default %(default)s)")
    options.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options.add_argument("--pairs", type=whole_from(1), default=41, help="default %(default)s")
    args = options.parse_args(argv)
    try:
        found = measure(args.checkpoint, args.row, args.dtype, args.pairs)
    except (ValueError, OSError) as error:
        options.error(str(error))
    for part in ("prefill", "decode"):
        plain, ratio = found[part]["plain"], found[part]["ratio"]
        print(
            f"{part}: {1e3 * plain:.2f} ms of CPU time, compressed {ratio.median:.3f} of it"
            f" [{ratio.low:.3f}, {ratio.high:.3f}]"
        )
    if found["busy"]:
        from libra.utils.timing import BUSY

        print(BUSY)
    return 0


if __name__ == "__main__":
    sys.exit(main())
