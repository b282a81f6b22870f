"""Table E: the embedded model fine-tuned with its visual tokens compressed and without, and the page with its
four cells.

:mod:`mini.finetune` is the command. Everything that is finished is kept; the same command goes on after an
interruption.
"""

import json
import multiprocessing
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from eval.cells import read_cell, read_json
from libra import Compression
from libra.budget import actual
from libra.flops import layer_flops
from libra.identity import checkpoint_identity, code_identity, digest, row_identity
from libra.mini.questions import TYPES
from libra.mini.scenes import draw_scene
from libra.mini.shapes import easy_vqa, easy_vqa_image
from libra.rows import Row
from libra.utils.files import write_text
from libra.utils.provenance import REPOSITORY, commit, machine, require_clean, versions
from libra.utils.timing import now, paired_ratio, peak_memory, run_in_turns
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.train.runs import RECORD

from .answering import EASY_VQA_SHARE
from .questions import ask

START = REPOSITORY / "mini" / "checkpoint"
CONFIG = REPOSITORY / "configs" / "mini" / "r50.yaml"
TURNS = 3  # questions a conversation
EVALUATED = {"vanilla": "whole", "r50": "compressed"}  # rows of the embedded benchmark → what they are here
TRAINED = ("start", "whole", "compressed")
SAMPLED_FROM = 40_000_000  # far from the seeds that the checkpoint was trained with


@dataclass(frozen=True)
class Sizes:
    """A decoder and what it reads: rows of one image and a text behind it; ``layers`` of the compression."""

    name: str
    width: int
    inner: int
    depth: int
    heads: int
    visual: int
    text: int
    rows: int
    compressed: tuple[int, ...]

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


def write_data(folder: Path, count: int, seed: int) -> None:
    """Conversations about ``count`` fresh images in LLaVA's format; nothing is done where they are there
    already."""
    stamp = json.dumps({"count": count, "seed": seed, "turns": TURNS})
    if (folder / "made.json").is_file() and (folder / "made.json").read_text() == stamp:
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    paths, by_image = easy_vqa("train")
    samples = []
    for number in tqdm(range(count), desc="drawing", unit=" images", mininterval=1):
        rng = np.random.default_rng([SAMPLED_FROM + seed, number])
        if rng.random() < EASY_VQA_SHARE:
            chosen = list(paths)[rng.integers(len(paths))]
            image = easy_vqa_image(paths[chosen])
            questions = [by_image[chosen][i] for i in rng.permutation(len(by_image[chosen]))[:TURNS]]
        else:
            scene = draw_scene(rng, "train")
            image, questions = Image.fromarray(scene.image), ask(rng, scene.digits, TURNS)
        image.save(folder / "images" / f"{number}.png")
        turns = [
            {"from": who, "value": text} for pair in questions for who, text in zip(("human", "gpt"), pair)
        ]
        turns[0]["value"] = f"<image>\n{turns[0]['value']}"
        samples.append({"id": number, "image": f"{number}.png", "conversations": turns})
    write_text(folder / "data.json", json.dumps(samples))
    write_text(folder / "made.json", stamp)


def _call(arguments: list[str], quiet: bool = False) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    env.update(
        TOKENIZERS_PARALLELISM="false", PYTHONPATH=f"{REPOSITORY}{os.pathsep}{env.get('PYTHONPATH', '')}"
    )
    output = subprocess.DEVNULL if quiet else None  # of what is printed; errors and progress are always shown
    subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, env=env, check=True, stdout=output)


def fine_tune(folder: Path, data: Path, kind: str, options) -> dict:
    """Train one of the two, or go on with it; returns its log's last entry and the losses."""
    state = folder / "trainer_state.json"
    if not (read_json(folder / RECORD) or {}).get("finished"):  # the state is written before the model is
        print(f"fine-tuning, visual tokens {kind}", file=sys.stderr)
        _call(
            [
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node",
                str(options.processes),
                "-m",
                "llava.train.train",
                "--model_name_or_path",
                str(START),
                "--version",
                "mini",
                "--data_path",
                str(data / "data.json"),
                "--image_folder",
                str(data / "images"),
                "--output_dir",
                str(folder),
                "--max_steps",
                str(options.steps),
                "--per_device_train_batch_size",
                str(options.batch),
                "--learning_rate",
                str(options.learning_rate),
                "--lr_scheduler_type",
                "cosine",
                "--warmup_steps",
                "0.03",
                "--adam_beta2",
                "0.98",
                "--weight_decay",
                "0.03",
                "--model_max_length",
                "1024",
                "--seed",
                str(options.seed),
                "--bf16",
                "True",
                "--logging_steps",
                str(max(1, options.steps // 40)),
                "--save_steps",
                "100",
                "--save_total_limit",
                "1",
                "--report_to",
                "none",
                "--dataloader_num_workers",
                "0",
                *(["--compression", str(CONFIG)] if kind == "compressed" else []),
            ]
        )
    history = (read_json(state) or {"log_history": []})["log_history"]
    if not history:
        raise ValueError(f"{state} tells of no training: delete {folder} and run the same command again")
    return {"losses": [[entry["step"], entry["loss"]] for entry in history if "loss" in entry], **history[-1]}


def made_of() -> dict:
    """What the two runs depend on besides their options: the start, the compression, the code."""
    folders = {"training": REPOSITORY / "llava" / "train", "mini": REPOSITORY / "mini"}
    code = code_identity(**{name: sorted(folder.glob("*.py")) for name, folder in folders.items()})
    return {
        "start": checkpoint_identity(str(START)),
        "row": row_identity(Row.from_yaml(CONFIG)),
        "code": code,
    }


def evaluate(output: Path, checkpoint: Path, options) -> dict[str, dict[str, list[float]]]:
    """{whole, compressed} → question type → 1 or 0 for each held-out question."""
    _call(
        [
            "-m",
            "eval.run",
            "--table",
            "1",
            "--suite",
            "mini",
            "--rows",
            ",".join(EVALUATED),
            "--checkpoint",
            str(checkpoint),
            "--output",
            str(output),
            "--benchmark",
            str(options.benchmark),
            "--processes",
            str(options.processes),
            *(["--limit", str(options.limit)] if options.limit else []),
        ],
        quiet=True,
    )
    scores: dict[str, dict[str, list[float]]] = {name: {} for name in EVALUATED.values()}
    for row, name in EVALUATED.items():
        for kind in TYPES:
            path = output / "cells" / f"mini.{row}.mini_{kind}.json"
            cell = read_cell(path)
            if cell is None or cell["status"] != "ok":
                raise ValueError(f"{path} holds no answers: run the same command again")
            scores[name][kind] = cell["correct"]
    return scores


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
    """Forward and backward of the language model, compressed against whole, in turns in this process, one
    thread."""
    compression = Compression.from_dict({**base.to_dict(), "layers": list(sizes.compressed)})
    memory = _peaks(sizes, compression)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, given = _model(sizes)

    def seconds(chosen: Compression | None) -> float:
        model.set_compression(chosen)
        start = now(torch.device("cpu"))
        _step(model, given)
        return now(torch.device("cpu")).since(start).cpu

    ways = {"whole": lambda: seconds(None), "compressed": lambda: seconds(compression)}
    try:
        with tqdm(total=2 * (pairs + 1), desc=sizes.name, unit=" steps") as bar:
            runs = run_in_turns(ways, pairs + 1, lambda _: bar.update())[1:]  # the first calls are slower
    finally:
        torch.set_num_threads(threads)
    return {
        "sizes": asdict(sizes),
        "pairs": pairs,
        "cpu_seconds": [median(run[name] for run in runs) for name in ways],
        "ratio": asdict(paired_ratio(runs, "compressed", "whole")),
        "flops_ratio": sizes.flops(compression) / sizes.flops(Compression(method="vanilla")),
        "peak_bytes": memory,
    }


def _mean(scores: dict[str, list[float]], kinds=TYPES) -> tuple[float, float]:
    """Percent over question types, and its standard error."""
    shares = [np.mean(scores[kind]) for kind in kinds]
    variance = sum(p * (1 - p) / len(scores[kind]) for p, kind in zip(shares, kinds)) / len(kinds) ** 2
    return 100 * float(np.mean(shares)), 100 * float(np.sqrt(variance))


def _difference(one: dict[str, list[float]], other: dict[str, list[float]]) -> tuple[float, float]:
    """Mean paired difference in points over question types, and its standard error."""
    pairs = [np.subtract(one[kind], other[kind]) for kind in TYPES]
    error = np.sqrt(sum(np.var(pair) / len(pair) for pair in pairs)) / len(pairs)
    return 100 * float(np.mean([pair.mean() for pair in pairs])), 100 * float(error)


NAMES = {"start": "not fine-tuned", "whole": "all visual tokens", "compressed": "Libra-Merging, 50%"}
LIBRA = NAMES["compressed"]


def report(result: dict) -> str:
    """The Markdown page of a result."""
    return "\n".join(
        [
            "# Training with compression (Table E)",
            "",
            "The paper's training table is in a supplement that was not at hand: its cells stay empty.",
            "",
            f"| LLaVA-1.5-7B, the paper's | evaluated whole | evaluated with {LIBRA} | time a step |",
            "|---|--:|--:|--:|",
            *[f"| fine-tuned with {NAMES[name]} |  |  |  |" for name in TRAINED[1:]],
            "",
            "## The embedded model, measured",
            "",
            *_accuracy(result),
            "",
            "## What a step costs",
            "",
            *_cost(result["cost"]),
            "",
            *_origin(result),
            "",
        ]
    )


def _accuracy(result: dict) -> list[str]:
    scores, setup = result["scores"], result["setup"]
    questions = len(scores["start"]["whole"][TYPES[0]])
    lines = [
        f"Fine-tuned from [mini/checkpoint](../../mini/README.md) on {setup['samples']:,} fresh images with"
        f" {TURNS} questions"
        f" each (scenes and easy-VQA, in the shares of its own training): {setup['steps']} steps of"
        f" {setup['rows']} images,"
        f" learning rate {setup['learning_rate']:g} with a cosine, vision tower frozen, bfloat16, seed"
        f" {setup['seed']}. Both"
        " runs see the same samples in the same order.",
        "",
        f"Exact match in percent over the {len(TYPES)} question types, {questions} held-out questions each,"
        " ± standard error."
        " What compressing costs is the mean paired difference, in points.",
        "",
        f"| fine-tuned with | evaluated whole | evaluated with {LIBRA} | cost of compressing | last training"
        " loss |",
        "|---|--:|--:|--:|--:|",
    ]
    for name in TRAINED:
        cells = ["{:.1f} ± {:.1f}".format(*_mean(scores[name][how])) for how in EVALUATED.values()]
        cells.append(
            "{:+.1f} ± {:.1f}".format(*_difference(scores[name]["compressed"], scores[name]["whole"]))
        )
        cells.append("" if name == "start" else f"{_last_loss(result['training'][name]):.3f}")
        lines.append(f"| {NAMES[name]} | {' | '.join(cells)} |")
    lines += [
        "",
        "Question type by question type:",
        "",
        f"| fine-tuned with, evaluated | {' | '.join(kind.replace('_', ' ') for kind in TYPES)} |",
        "|---|" + "--:|" * len(TYPES),
    ]
    for name in TRAINED:
        for how in EVALUATED.values():
            cells = [f"{_mean(scores[name][how], (kind,))[0]:.1f}" for kind in TYPES]
            lines.append(f"| {NAMES[name]}, {how} | {' | '.join(cells)} |")
    return lines


def _cost(entries: list[dict]) -> list[str]:
    lines = [
        f"Forward and backward of the language model, without vision tower and optimizer, with {LIBRA}"
        " against all visual"
        " tokens: in turns in one process of one thread, CPU seconds, the median of the pairs' ratios and"
        " its interval. FLOPs:"
        " of all tokens in the layers, the text's too. Memory: the peak above the weights, gradients"
        " included, each in a"
        " process of its own.",
        "",
        "| decoder | tokens | seconds, whole | seconds, compressed | ratio | FLOPs ratio | ratio ÷ FLOPs"
        " ratio | memory, MiB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for entry in entries:
        sizes, ratio = entry["sizes"], entry["ratio"]
        cells = [
            sizes["name"],
            f"{sizes['rows']} × ({sizes['visual']} + {sizes['text']})",
            *(f"{seconds:.3f}" for seconds in entry["cpu_seconds"]),
            f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f}, {entry['pairs']} pairs)",
            f"{entry['flops_ratio']:.3f}",
            f"{ratio['median'] / entry['flops_ratio']:.2f}",
            " → ".join(f"{size / 2**20:.0f}" for size in entry["peak_bytes"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _origin(result: dict) -> list[str]:
    minutes = [
        f"{result['training'][name]['train_runtime'] / 60:.1f} ({NAMES[name]})" for name in TRAINED[1:]
    ]
    where = result["origin"]
    return [
        f"Wall clock of the two fine-tuning runs, one after the other, {result['setup']['processes']}"
        " processes each: minutes"
        f" {', '.join(minutes)}.",
        "",
        f"Commit {where['commit']}, {where['machine']['cpu']}, {where['machine']['cores']} cores; torch"
        f" {where['versions']['torch']}, transformers {where['versions']['transformers']}."
        " `bash scripts/eval_tableE.sh --publish` makes this page.",
    ]


def _last_loss(training: dict) -> float:
    losses = [loss for _, loss in training["losses"]]
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def run(options, commands) -> int:
    """Fill the table by the options of :mod:`mini.finetune`; its parser ``commands`` tells errors. Returns
    the status."""
    options.output, options.benchmark = options.output.resolve(), options.benchmark.resolve()
    rows = options.batch * options.processes
    setup = {
        "samples": options.steps * rows,
        "steps": options.steps,
        "rows": rows,
        "learning_rate": options.learning_rate,
        "seed": options.seed,
        "processes": options.processes,
    }
    try:
        if options.publish:
            require_clean()
        runs = options.output / f"run-{digest([setup, made_of()])[:8]}"  # other settings have other runs
        write_data(runs / "data", setup["samples"], options.seed)
        training = {kind: fine_tune(runs / kind, runs / "data", kind, options) for kind in TRAINED[1:]}
        folders = {"start": START, **{kind: runs / kind for kind in TRAINED[1:]}}
        scores = {name: evaluate(runs / f"eval-{name}", folder, options) for name, folder in folders.items()}
        cost = runs / "cost.json"
        base = Row.from_yaml(CONFIG).compression
        costs = (read_json(cost) or {}).get("costs")
        if not costs or costs[0].get("pairs") != options.pairs:
            costs = [measure(sizes, base, options.pairs) for sizes in MEASURED]
            write_text(cost, json.dumps({"costs": costs}, indent=1) + "\n")
    except subprocess.CalledProcessError as error:
        commands.error(
            f"{' '.join(error.cmd[1:6])} … ended with status {error.returncode}; what it says stands above"
        )
    except (ValueError, OSError) as error:
        commands.error(str(error))
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    result = {
        "setup": setup,
        "training": training,
        "scores": scores,
        "cost": costs,
        "origin": {"commit": commit(), "machine": machine(), "versions": versions(("torch", "transformers"))},
    }
    write_text(options.output / "training.json", json.dumps(result, indent=1) + "\n")
    page = report(result)
    write_text(options.output / "training.md", page)
    if options.publish:
        write_text(REPOSITORY / "docs" / "results" / "training.md", page)
    print(page)
    return 0
