"""Two processes on a CPU: DDP, ZeRO-2 and ZeRO-3 learn the same, go on after a kill, and save what loads."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import two_processes
from safetensors.torch import load_file, save_file
from test_train import MINI, losses, scenes
from test_train import run as run_here

from llava.model.builder import load_pretrained_model

ROOT = Path(__file__).parents[1]
COMPRESSION = ROOT / "configs/mini/r50.yaml"
STEPS = 20
CURVE = ["--max_steps", str(STEPS), "--gradient_checkpointing", "True"]
pytestmark = pytest.mark.slow
fsdp_runs_here = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this torch's FSDP needs GPUs"
)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """One sample a process and step, half of them without an image: steps in which one rank has text only are
    certain."""
    return scenes(tmp_path_factory.mktemp("scenes"), 2 * STEPS, texts=range(0, 2 * STEPS, 2))


def flags_of(output: Path, few: list[str], *more: str) -> list[str]:
    return [
        *few,
        "--model_name_or_path",
        str(MINI),
        "--version",
        "mini",
        "--compression",
        str(COMPRESSION),
        "--output_dir",
        str(output),
        "--report_to",
        "none",
        "--per_device_train_batch_size",
        "1",
        "--logging_steps",
        "1",
        "--learning_rate",
        "1e-4",
        "--model_max_length",
        "1024",
        "--disable_tqdm",
        "True",
        "--save_strategy",
        "no",
        *more,
    ]


def run(output: Path, few: list[str], *more: str, **kwargs) -> list[dict]:
    return two_processes.train(output, flags_of(output, few, *more), **kwargs)


def deepspeed(stage: str) -> list[str]:
    pytest.importorskip("deepspeed")
    return ["--deepspeed", str(ROOT / "scripts" / f"{stage}.json")]


@pytest.fixture(scope="module")
def ddp(few, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "ddp"
    return folder, run(folder, few, *CURVE)


def test_two_processes_learn_what_one_does(few, ddp, tmp_path):
    """The loss is the mean over all supervised tokens of a step, wherever they are."""
    flags = ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2, "--save_strategy", "no"]
    log = run_here(tmp_path / "one", [*few, *CURVE, "--compression", COMPRESSION, *flags])
    assert len(losses(log)) == STEPS
    np.testing.assert_allclose(losses(ddp[1]), losses(log), rtol=1e-5)


def test_zero2_learns_what_ddp_does(few, ddp, tmp_path):
    log = run(tmp_path / "zero2", few, *CURVE, *deepspeed("zero2"))
    assert len(losses(log)) == STEPS
    np.testing.assert_allclose(losses(log), losses(ddp[1]), rtol=1e-5)


def test_accumulated_steps_under_zero2(few, tmp_path):
    """Two batches on each of two processes are four of one process."""
    flags = ["--max_steps", "3", "--save_strategy", "no", "--gradient_accumulation_steps"]
    log = run(tmp_path / "two", few, *deepspeed("zero2"), *flags, "2")
    compression = ["--compression", COMPRESSION, "--per_device_train_batch_size", 1]
    one = run_here(tmp_path / "one", [*few, *compression, *flags, 4])
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(
            *([entry[name] for entry in entries if name in entry] for entries in (log, one)), rtol=1e-4
        )


def run_with_a_kill(output: Path, few: list[str], *more: str, **kwargs) -> list[dict]:
    """Train the curve, be killed in the middle, and go on when called again."""
    middle = str(STEPS // 2)
    flags = flags_of(output, few, *CURVE, *more, "--save_strategy", "steps", "--save_steps", middle)
    with two_processes.started(output, flags, **kwargs) as processes:
        deadline = time.monotonic() + 300
        while not (output / f"checkpoint-{middle}" / "whole.json").exists():
            running = all(process.is_alive() for process in processes) and time.monotonic() < deadline
            assert running, output.with_suffix(".log").read_text()[-3000:]
            time.sleep(0.1)
    assert not (output / "trainer_state.json").exists()
    log = two_processes.train(output, flags, **kwargs)
    assert len(losses(log)) == STEPS
    return log


def check_weights(folder: Path, other: Path) -> None:
    one, two = (
        load_pretrained_model(str(path), None, "mini", device="cpu")[1].state_dict()
        for path in (folder, other)
    )
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-3, msg=name)


def test_zero3_learns_what_ddp_does_through_a_kill(few, ddp, tmp_path):
    log = run_with_a_kill(tmp_path / "zero3", few, *deepspeed("zero3"))
    np.testing.assert_allclose(losses(log), losses(ddp[1]), rtol=1e-5)
    check_weights(tmp_path / "zero3", ddp[0])


def allow_fsdp_here() -> None:
    """accelerate shards on GPUs only, though torch's FSDP works on a CPU as well: make it take one for the
    other."""
    from accelerate import state

    from llava.train import arguments

    before = state.AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        before(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            state.PartialState._shared_state["distributed_type"] = self.distributed_type = (
                state.DistributedType.FSDP
            )
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    state.AcceleratorState.__init__, arguments._check_of_transformers = init, lambda *given: None


@fsdp_runs_here
def test_fsdp_learns_what_ddp_does_through_a_kill(few, ddp, tmp_path):
    log = run_with_a_kill(tmp_path / "fsdp", few, "--fsdp", prepare=allow_fsdp_here)
    np.testing.assert_allclose(losses(log), losses(ddp[1]), rtol=1e-5)
    check_weights(tmp_path / "fsdp", ddp[0])


@fsdp_runs_here
def test_adapters_under_fsdp(few, tmp_path):
    """In bfloat16, for which FSDP casts what a layer is given."""
    flags = ["--fsdp", "--bf16", "True", "--lora_enable", "True", "--lora_r", "4", "--max_steps", "3"]
    log = run(tmp_path / "out-lora", few, *flags, prepare=allow_fsdp_here)
    assert len(losses(log)) == 3
    load_pretrained_model(str(tmp_path / "out-lora"), str(MINI), "out-lora", device="cpu")


def test_zero3_in_bfloat16_saves_what_loads(few, tmp_path):
    """Tiles with newlines, whose parameter belongs to no layer; 16-bit weights in the published layout."""
    start = tmp_path / "start"
    shutil.copytree(MINI, start)
    settings = json.loads((start / "config.json").read_text())
    pinpoints = [[96, 192], [192, 96]]
    settings.update(
        mm_patch_merge_type="spatial_unpad", image_aspect_ratio="anyres", image_grid_pinpoints=pinpoints
    )
    (start / "config.json").write_text(json.dumps(settings))
    weights = load_file(start / "model.safetensors")
    save_file(
        {**weights, "model.image_newline": torch.zeros(128).half()},
        start / "model.safetensors",
        {"format": "pt"},
    )
    flags = ["--bf16", "True", "--model_name_or_path", str(start), "--max_steps", "3"]
    log = run(tmp_path / "out", few, *deepspeed("zero3"), *flags)
    assert len(losses(log)) == 3 and all(np.isfinite(losses(log)))
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert state["lm_head.weight"].dtype == torch.bfloat16 and state["model.image_newline"].abs().sum() > 0
    load_pretrained_model(str(tmp_path / "out"), None, "mini", device="cpu")


def test_adapters_under_ddp(few, tmp_path):
    flags = ["--lora_enable", "True", "--lora_r", "4", "--bf16", "True", "--max_steps", "3"]
    log = run(tmp_path / "out-lora", few, *flags)
    assert len(losses(log)) == 3
    load_pretrained_model(str(tmp_path / "out-lora"), str(MINI), "out-lora", device="cpu")
