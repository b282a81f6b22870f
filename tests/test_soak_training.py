"""Kill -9 at ten moments of a training: what comes out is what an unbroken run gives, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train import MINI, scenes

ROOT = Path(__file__).parents[1]
STEPS, EVERY = 24, 4
KILLS, WHILE_WRITING = 10, (3, 7)  # of the ten, the numbers of those that come while a checkpoint is written
pytestmark = pytest.mark.soak


def start(output: Path, flags: list[str]) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "llava.train.train",
        "--model_name_or_path",
        str(MINI),
        *flags,
        "--output_dir",
        str(output),
        "--compression",
        "mini/r50",
        "--max_steps",
        str(STEPS),
        "--save_steps",
        str(EVERY),
        "--save_total_limit",
        "2",
        "--per_device_train_batch_size",
        "2",
        "--learning_rate",
        "1e-4",
        "--report_to",
        "none",
        "--disable_tqdm",
        "True",
        "--logging_steps",
        "1",
        "--dataloader_num_workers",
        "1",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    said = output.with_suffix(".log").open("a")
    return subprocess.Popen(
        command, cwd=output.parent, env=env, stdout=said, stderr=said, start_new_session=True
    )


def kill(process: subprocess.Popen) -> None:
    """With its workers, at once."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def unsealed(output: Path) -> set[Path]:
    return {
        path.parent
        for path in output.glob("checkpoint-*/model.safetensors")
        if not (path.parent / "whole.json").exists()
    }


def wait_for_writing(process: subprocess.Popen, output: Path) -> bool:
    """Until a checkpoint lies there in part; False where the process ended before."""
    while process.poll() is None:
        if unsealed(output):
            return True
        time.sleep(0.002)
    return False


def test_kill_at_ten_moments_of_a_training(tmp_path):
    flags, moments = scenes(tmp_path, 2 * STEPS, texts=range(0, 2 * STEPS, 5), rounds=1), random.Random(0)
    whole = start(tmp_path / "whole", flags)
    begin = time.monotonic()
    assert whole.wait() == 0, (tmp_path / "whole.log").read_text()[-3000:]
    seconds, torn, done = time.monotonic() - begin, 0, 0
    output = tmp_path / "killed"
    while done < KILLS:
        process = start(output, flags)
        if done in WHILE_WRITING:
            if not wait_for_writing(process, output):
                break
            kill(process)
            torn += bool(unsealed(output))
        else:
            try:
                process.wait(moments.uniform(0.2, 0.9) * seconds)
                break  # it reached its end
            except subprocess.TimeoutExpired:
                kill(process)
        done += 1
    print(f"{done} kills, {torn} with a checkpoint in part")
    assert start(output, flags).wait() == 0, output.with_suffix(".log").read_text()[-3000:]
    assert done == KILLS and torn >= 2
    one, two = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", output))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert "Traceback" not in output.with_suffix(".log").read_text()
    reports = [(folder / "samples.json").read_text() for folder in (tmp_path / "whole", output)]
    assert reports[0] == reports[1] and not list(output.glob(".*"))
