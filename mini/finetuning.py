"""Fine-tunes the embedded model with its visual tokens compressed and without, and has Table E filled with
what comes out.

:mod:`mini.finetune` is the command. Everything that is finished is kept; the same command goes on after an
interruption.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from eval.cells import read_json
from eval.run import main as fill_table
from eval.suites import get_table
from eval.training import NOTED
from libra.identity import checkpoint_identity, code_identity, digest, row_identity
from libra.mini.scenes import draw_scene
from libra.mini.shapes import easy_vqa, easy_vqa_image
from libra.rows import Row
from libra.utils.files import write_text
from libra.utils.provenance import REPOSITORY, require_clean
from llava.train.runs import RECORD

from .answering import EASY_VQA_SHARE
from .questions import ask
from .step_cost import MEASURED, measure

START = REPOSITORY / "mini" / "checkpoint"
CONFIG = REPOSITORY / "configs" / "mini" / "tableE" / "r50.yaml"
TURNS = 3  # questions a conversation
SAMPLED_FROM = 40_000_000  # far from the seeds that the checkpoint was trained with


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


def _flags(folder: Path, data: Path, options) -> dict[str, object]:
    """Of llava.train.train, for a run that is written to ``folder``."""
    return {
        "model_name_or_path": START,
        "version": "mini",
        "data_path": data / "data.json",
        "image_folder": data / "images",
        "output_dir": folder,
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "adam_beta2": 0.98,
        "weight_decay": 0.03,
        "model_max_length": 1024,
        "seed": options.seed,
        "bf16": True,
        "logging_steps": max(1, options.steps // 40),
        "save_steps": 100,
        "save_total_limit": 1,
        "report_to": "none",
        "dataloader_num_workers": 0,
    }


def _train(words: list[str], processes: int) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    env.update(
        TOKENIZERS_PARALLELISM="false", PYTHONPATH=f"{REPOSITORY}{os.pathsep}{env.get('PYTHONPATH', '')}"
    )
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, "-m", *torchrun, "-m", "llava.train.train", *words]
    subprocess.run(command, cwd=REPOSITORY, env=env, check=True)


def is_finished(folder: Path) -> bool:
    """Whether a run's model is there: its record says so last, after the state and the model."""
    return bool((read_json(folder / RECORD) or {}).get("finished"))


def fine_tune(folder: Path, data: Path, kind: str, options) -> dict:
    """Train ``whole`` or ``compressed``, or go on with it; returns its log's last entry and the losses."""
    state = folder / "trainer_state.json"
    if not is_finished(folder):
        print(f"fine-tuning, visual tokens {kind}", file=sys.stderr)
        flags = _flags(folder, data, options) | ({"compression": CONFIG} if kind == "compressed" else {})
        _train(
            [word for name, value in flags.items() for word in (f"--{name}", str(value))], options.processes
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


def _costs(path: Path, pairs: int) -> list[dict]:
    """What ``path`` holds of that many pairs, else measured now."""
    costs = (read_json(path) or {}).get("costs")
    if not costs or costs[0].get("pairs") != pairs:
        base = Row.from_yaml(CONFIG).compression
        costs = [measure(sizes, base, pairs) for sizes in MEASURED]
        write_text(path, json.dumps({"costs": costs}, indent=1) + "\n")
    return costs


def table_words(options, trained: Path | None) -> list[str]:
    """The arguments of :mod:`eval.run` that fill Table E, with the two runs in ``trained``."""
    # Relative paths: the page names the command, and no folder of this machine.
    words = ["--table", "E", *options.rows, "--output", os.path.relpath(options.output)]
    words += ["--trained", os.path.relpath(trained)] if trained else []
    words += ["--benchmark", str(options.benchmark), "--processes", str(options.processes)]
    words += ["--limit", str(options.limit)] if options.limit else []
    return words + ["--publish"] * options.publish


def tell_plan(options, runs: Path, setup: dict) -> int:
    """Print what :func:`run` would do; returns the status."""
    done = {kind: is_finished(runs / kind) for kind in get_table("E").trained}
    for kind, finished in done.items():
        doing = (
            "finished" if finished else f"{setup['steps']} steps of {setup['rows']} conversations to train"
        )
        print(f"fine-tuning, visual tokens {kind}: {doing}")
    print()
    return fill_table([*table_words(options, runs if all(done.values()) else None), "--dry-run"])


def run(options, commands) -> int:
    """Fine-tune and fill the table by the options of :mod:`mini.finetune`; its parser ``commands`` tells
    errors. Returns the status."""
    options.output, options.benchmark = options.output.resolve(), options.benchmark.resolve()
    rows = options.batch * options.processes
    setup = {
        "samples": options.steps * rows,
        "turns": TURNS,
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
        if options.dry_run:
            return tell_plan(options, runs, setup)
        write_data(runs / "data", setup["samples"], options.seed)
        training = {
            kind: fine_tune(runs / kind, runs / "data", kind, options) for kind in get_table("E").trained
        }
        noted = {"setup": setup, "training": training, "cost": _costs(runs / "cost.json", options.pairs)}
        write_text(options.output / NOTED, json.dumps(noted, indent=1) + "\n")
    except subprocess.CalledProcessError as error:
        commands.error(f"fine-tuning ended with status {error.returncode}; what it says stands above")
    except (ValueError, OSError) as error:
        commands.error(str(error))
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return fill_table(table_words(options, runs))
