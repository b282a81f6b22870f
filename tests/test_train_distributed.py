"""Two processes on a CPU: DDP, ZeRO-2 and ZeRO-3 learn the same, go on after a kill, and save what loads."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train import MINI, losses, scenes

from llava.model.builder import load_pretrained_model

ROOT = Path(__file__).parents[1]
STEPS = 20
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """One sample a process and step, half of them without an image: steps in which one rank has text only are certain."""
    return scenes(tmp_path_factory.mktemp("scenes"), 2 * STEPS, texts=range(0, 2 * STEPS, 2))


def run(output: Path, few: list[str], *flags: str, script: bool = False) -> list[dict]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, *(["llava/train/train.py"] if script else ["-m", "llava.train.train"]), *few,
         "--model_name_or_path", str(MINI), "--version", "mini", "--compression", str(ROOT / "configs/mini/r50.yaml"),
         "--output_dir", str(output), "--report_to", "none", "--per_device_train_batch_size", "1", "--logging_steps", "1",
         "--learning_rate", "1e-4", "--model_max_length", "1024", "--max_steps", str(STEPS), "--save_steps", "10",
         "--disable_tqdm", "True", *flags],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


@pytest.fixture(scope="module")
def ddp(few, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    return folder, run(folder, few, "--gradient_checkpointing", "True")


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_zero_learns_what_ddp_does(few, ddp, tmp_path, stage):
    pytest.importorskip("deepspeed")
    folder, log = ddp
    deepspeed = ["--deepspeed", f"scripts/{stage}.json"]
    mine = run(tmp_path / "whole", few, *deepspeed, "--gradient_checkpointing", "True", script=True)
    assert len(losses(mine)) == STEPS
    np.testing.assert_allclose(losses(mine), losses(log), rtol=2e-3)

    if stage == "zero2":
        return
    half = tmp_path / "half"
    shutil.copytree(tmp_path / "whole" / "checkpoint-10", half / "checkpoint-10")
    again = run(half, few, *deepspeed, "--gradient_checkpointing", "True")
    np.testing.assert_allclose(losses(again), losses(mine), rtol=1e-4)
    one, other = (load_pretrained_model(str(path), None, "mini", device="cpu")[1].state_dict() for path in (folder, half))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=2e-4, rtol=1e-2, msg=name)


def test_zero3_in_bfloat16_saves_what_loads(few, tmp_path):
    """Tiles with newlines, whose parameter belongs to no layer; 16-bit weights in the published layout."""
    pytest.importorskip("deepspeed")
    start = tmp_path / "start"
    shutil.copytree(MINI, start)
    settings = json.loads((start / "config.json").read_text())
    pinpoints = [[96, 192], [192, 96]]
    settings.update(mm_patch_merge_type="spatial_unpad", image_aspect_ratio="anyres", image_grid_pinpoints=pinpoints)
    (start / "config.json").write_text(json.dumps(settings))
    weights = load_file(start / "model.safetensors")
    save_file({**weights, "model.image_newline": torch.zeros(128).half()}, start / "model.safetensors", {"format": "pt"})
    log = run(
        tmp_path / "out", few, "--deepspeed", "scripts/zero3.json", "--bf16", "True", "--model_name_or_path", str(start),
        "--max_steps", "4", "--save_strategy", "no",
    )
    assert len(losses(log)) == 4 and all(np.isfinite(losses(log)))
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert state["lm_head.weight"].dtype == torch.bfloat16 and state["model.image_newline"].abs().sum() > 0
    load_pretrained_model(str(tmp_path / "out"), None, "mini", device="cpu")


def test_adapters_under_ddp(few, tmp_path):
    flags = ["--lora_enable", "True", "--lora_r", "4", "--bf16", "True", "--max_steps", "4", "--save_strategy", "no"]
    log = run(tmp_path / "out-lora", few, *flags)
    assert len(losses(log)) == 4
    load_pretrained_model(str(tmp_path / "out-lora"), str(MINI), "out-lora", device="cpu")
