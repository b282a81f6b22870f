"""Requests a second of vLLM with compressed pictures on a model whose time is prefill: by hand, on a quiet
machine, in the environment of scripts/vllm_env.sh.

    . scripts/vllm_env.sh cpu && OMP_NUM_THREADS=2 python tests/vllm_throughput.py

A random LLaVA of 500M parameters and 576 tokens a picture answers the same requests with 0, 50 and 75% of
them removed, in turns whose order changes from round to round, so that what disturbs the machine disturbs all
three; a first round does not count. Prints the requests a second of each round, and the median over the
rounds of their ratio to those with all tokens in the same round. Exit status 1 where it is below 1.9 at 50%
or 3.2 at 75%.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from serve_client import questions
from vllm_answers import run

from libra.latency.random_llava import write_checkpoint
from libra.rows import ModelSpec
from llava.convert import convert

RATIOS = (0, 0.5, 0.75)
EXPECTED = {0.5: 1.9, 0.75: 3.2}
ROW = {"method": "libra-input", "compensation": "reserved", "ratio": 0.5}
SIZES = ModelSpec("random", 8, 2048, 5632, 1024, (576,), "")
VISION = dict(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=336,
    patch_size=14,
    projection_dim=128,
)


def write_model(folder: Path) -> Path:
    """The model in transformers' format, below ``folder``."""
    write_checkpoint(folder / "original", SIZES, SIZES.layers, VISION, progress=False)
    settings = json.loads((folder / "original/config.json").read_text())
    settings["conversation"] = "mini"
    (folder / "original/config.json").write_text(json.dumps(settings))
    convert(str(folder / "original"), str(folder / "model"))
    return folder / "model"


def turns(rounds: int) -> list[list[float]]:
    """The order of the ratios in each round: each comes first, second and last as often as the others."""
    places = range(len(RATIOS))
    return [[RATIOS[(number + place) % len(RATIOS)] for place in places] for number in range(rounds)]


def job(model: Path, folder: Path, requests: int, order: list[list[float]], dtype: str) -> dict:
    """The rounds' calls, one a ratio; every round has pictures of its own, which no cache has seen."""
    token = json.loads((model / "config.json").read_text())["image_token_index"]
    asked = questions(requests * len(order))
    calls = []
    for number, ratios in enumerate(order):
        prompts = []
        for i, (image, text) in enumerate(asked[number * requests : (number + 1) * requests]):
            file = folder / f"{number}-{i}.png"
            image.save(file)
            prompts.append({"text": f"USER: <image>\n{text} ASSISTANT:", "files": [str(file)]})
        for ratio in ratios:
            own = [{**prompt, "kwargs": {"libra_ratio": ratio}} for prompt in prompts]
            calls.append({"prompts": own, "most": 1, "endless": True, "token": token})
    engine = {"model": str(model), "dtype": dtype, "max_model_len": 1024, "enforce_eager": True}
    engine |= {"max_num_seqs": 8, "enable_prefix_caching": False, "mm_processor_cache_gb": 0}
    return {"engine": engine, "calls": calls}


def report(order: list[list[float]], said: list[dict], requests: int) -> bool:
    """Print what was measured; whether all of it is what is expected."""
    calls = iter(said)
    rounds = [{ratio: next(calls) for ratio in ratios} for ratios in order][1:]
    good = True
    for ratio in RATIOS:
        gains = [one[0]["seconds"] / one[ratio]["seconds"] for one in rounds]
        shown = " ".join(f"{requests / one[ratio]['seconds']:.3f}" for one in rounds)
        columns, gain = rounds[0][ratio]["pictures"][0], statistics.median(gains)
        least = EXPECTED.get(ratio, 0)
        print(
            f"{ratio:.0%} removed: {columns} tokens a picture, {shown} requests a second, {gain:.2f} times"
            f" ({min(gains):.2f} to {max(gains):.2f})" + (f", at least {least} expected" if least else "")
        )
        good = good and gain >= least
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=8, help="of each round and ratio (default 8)")
    parser.add_argument("--row", default=json.dumps(ROW), help="JSON of a compression (Libra at the input)")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    if min(args.rounds, args.requests) < 1:
        parser.error("--rounds and --requests are 1 or more")
    order = turns(args.rounds + 1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        asked = job(write_model(folder), folder, args.requests, order, args.dtype)
        (said,) = run(folder / "job", [asked], json.loads(args.row))
    return 0 if report(order, said, args.requests) else 1


if __name__ == "__main__":
    sys.exit(main())
