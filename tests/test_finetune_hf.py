"""The example that trains a Hugging Face model with transformers' Trainer: labels, LoRA, two processes with
ZeRO-2."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from qwen_folder import TEMPLATE, write_qwen
from transformers import AutoProcessor

from libra.mini.benchmark import scene_sample
from llava.convert import convert

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "docs" / "examples" / "finetune_hf.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The embedded model in Hugging Face's format, and eight questions about pictures."""
    folder = tmp_path_factory.mktemp("finetune")
    convert(str(ROOT / "mini" / "checkpoint"), str(folder / "model"))
    samples = []
    for number in range(8):
        sample = scene_sample("reading", number)
        sample.image.save(folder / f"{number}.png")
        samples.append({"image": f"{number}.png", "question": sample.question, "answer": str(sample.answer)})
    (folder / "samples.json").write_text(json.dumps(samples))
    return folder


def train(
    folder: Path, output: str, *options: str, launcher=(), **environment: str
) -> tuple[list[float], str]:
    """The losses of three steps, and all that was printed."""
    settings = ("--max_steps", "3", "--logging_steps", "1", "--report_to", "none", "--use_cpu")
    files = ("--model", folder / "model", "--data", folder / "samples.json", "--output_dir", folder / output)
    words = [sys.executable, *launcher, EXAMPLE, *files, *settings, "--learning_rate", "1e-3", *options]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        list(map(str, words)),
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / output / "adapter_model.safetensors").stat().st_size > 0
    return [float(loss) for loss in re.findall(r"'loss': '([\d.e-]+)'", done.stdout)], done.stdout


def test_labels_are_the_answers_and_nothing_else(folder):
    spec = importlib.util.spec_from_file_location("finetune_hf", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks there
    spec.loader.exec_module(module)
    processor = AutoProcessor.from_pretrained(folder / "model", backend="pil")
    samples = json.loads((folder / "samples.json").read_text())[:3]
    samples[1]["answer"] = "6"  # so that rows are padded
    batch = module.collator(processor, folder)(samples)
    for row, sample in enumerate(samples):
        labels = batch["labels"][row]
        said = processor.decode(labels[labels != -100])
        assert said.replace(" ", "") == f"{sample['answer']}{processor.tokenizer.eos_token}".replace(" ", "")
        assert (labels[~batch["attention_mask"][row].bool()] == -100).all()
    assert not batch["attention_mask"].all()


@pytest.mark.slow
def test_a_family_that_llava_train_does_not_know(folder, tmp_path):
    write_qwen(tmp_path / "model", TEMPLATE + "{{ ' ' }}")
    samples = json.loads((folder / "samples.json").read_text())
    for number, sample in enumerate(samples):
        sample.update(
            question="what is this",
            answer="w7 w8" if number % 2 else "w9",
            image=str(folder / sample["image"]),
        )
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    losses, said = train(tmp_path, "out", "--per_device_train_batch_size", "4", "--compression", "fastv")
    assert len(losses) == 3 and losses[-1] < losses[0] and "3 prefills of 12 rows" in said


@pytest.mark.slow
def test_two_processes_with_zero2_train_as_one_does(folder):
    pytest.importorskip("deepspeed")
    alone, said = train(folder, "alone", "--per_device_train_batch_size", "4")
    assert len(alone) == 3 and alone[-1] < alone[0]
    assert "3 prefills of 12 rows: 3072 visual tokens became" in said
    both, _ = train(
        *(folder, "both", "--per_device_train_batch_size", "2", "--ddp_backend", "gloo"),
        *("--deepspeed", str(ROOT / "scripts" / "zero2.json")),
        launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        DS_ACCELERATOR="cpu",
    )
    assert both[:2] == pytest.approx(alone[:2], rel=0.02)
