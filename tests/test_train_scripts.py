"""The training scripts to their end, as a user calls them: both stages and LoRA, on a CPU, by every
launcher."""

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
from two_processes import free_port

from llava.model.builder import load_pretrained_model

ROOT = Path(__file__).parents[1]
STEPS = 3  # an epoch of six samples on two processes
EPOCHS = 3  # of the first stage
FLAGS = ("--version", "mini")  # what the embedded model needs and LLaVA does not
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The embedded model taken apart, a plain Llama and a CLIP tower; captions and talks for the two
    stages."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("parts")
    shutil.copytree(MINI, folder / "llama", ignore=shutil.ignore_patterns("vision_tower"))
    shutil.copytree(MINI / "vision_tower", folder / "tower")
    settings = json.loads((MINI / "config.json").read_text())
    plain = {
        key: value
        for key, value in settings.items()
        if not key.startswith(("mm_", "image_", "tokenizer_", "use_mm"))
    }
    plain.update(model_type="llama", architectures=["LlamaForCausalLM"])
    (folder / "llama" / "config.json").write_text(json.dumps(plain))
    weights = {
        name: value
        for name, value in load_file(MINI / "model.safetensors").items()
        if "mm_projector" not in name
    }
    save_file(weights, folder / "llama" / "model.safetensors", {"format": "pt"})
    scenes(folder / "captions", 2 * STEPS, rounds=1)
    scenes(folder / "talks", 2 * STEPS, texts=(1, 2))
    return folder


def environment(parts: Path, data: str, output: Path, **variables: str) -> dict[str, str]:
    return {
        **os.environ,
        "VIRTUAL_ENV": sys.prefix,
        "OMP_NUM_THREADS": "1",
        "GPUS": "2",
        "BATCH": "1",
        "MODEL": str(parts / "llama"),
        "VISION_TOWER": str(parts / "tower"),
        "OUTPUT": str(output),
        "DATA": str(parts / data / "data.json"),
        "IMAGES": str(parts / data / "images"),
        **variables,
    }


def together(cwd: Path, *calls: tuple[str, tuple[str, ...], dict[str, str]]) -> list[tuple[int, str]]:
    """Run scripts (name, flags, environment) at the same time, as on several machines; gives their exit
    status and words."""
    logs = [cwd / f"{number}.log" for number in range(len(calls))]
    running = []
    try:
        for log, (name, flags, env) in zip(logs, calls):
            command = ["bash", str(ROOT / "scripts" / f"{name}.sh"), *flags]
            with log.open("w") as out:
                running.append(subprocess.Popen(command, cwd=cwd, env=env, stdout=out, stderr=out))
        return [(process.wait(timeout=300), log.read_text()) for process, log in zip(running, logs)]
    finally:
        for process in running:
            process.terminate()


def log_of(output: Path) -> list[dict]:
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


def train(
    parts: Path, name: str, output: str, *variables: dict[str, str], flags: tuple[str, ...] = ()
) -> list[dict]:
    """Call a script to its end, for each of ``variables`` once and at the same time; gives the log."""
    data = "captions" if name == "pretrain" else "talks"
    if name == "pretrain":
        flags = (*flags, "--num_train_epochs", str(EPOCHS))
    calls = [(name, flags, environment(parts, data, parts / output, **own)) for own in variables]
    for status, said in together(parts, *calls):
        assert status == 0, said[-3000:]
    return log_of(parts / output)


def projector_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "mm_projector.bin", weights_only=True)


@pytest.fixture(scope="module")
def first_stage(parts):
    log = train(parts, "pretrain", "llava-pretrain", {})
    return parts / "llava-pretrain", losses(log)


def test_first_stage(parts, first_stage):
    folder, found = first_stage
    assert len(found) == STEPS * EPOCHS and sum(found[-STEPS:]) < 0.9 * sum(found[:STEPS])
    model = load_pretrained_model(str(folder), str(parts / "llama"), folder.name, device="cpu")[1]
    for name, value in projector_of(folder).items():
        assert torch.equal(model.state_dict()[name], value.float())
    assert model.config.mm_vision_select_layer == -2 and model.config.mm_projector_type == "mlp2x_gelu"


def check_same(parts: Path, first_stage, name: str, log: list[dict]) -> None:
    folder, found = first_stage
    np.testing.assert_allclose(losses(log), found, rtol=1e-3)
    torch.testing.assert_close(projector_of(parts / name), projector_of(folder), atol=1e-3, rtol=1e-2)


def test_deepspeeds_launcher_by_ssh(parts, first_stage, tmp_path):
    """Two processes of one machine, which is asked by ssh whether it is there and what its address is; a
    stand-in answers."""
    (tmp_path / "ssh").write_text('#!/bin/sh\necho "$@" >>"$(dirname "$0")/asked"\necho 127.0.0.1\n')
    (tmp_path / "ssh").chmod(0o755)
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    given = {"HOSTFILE": str(tmp_path / "hosts"), "MASTER_PORT": free_port(), "PATH": path}
    check_same(parts, first_stage, "by-ssh", train(parts, "pretrain", "by-ssh", given))
    assert "localhost hostname" in (tmp_path / "asked").read_text()


def on_two_machines(**variables: str) -> list[dict[str, str]]:
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "GPUS": "1", **variables}
    return [{**here, "NODE_RANK": rank} for rank in "01"]


def test_deepspeeds_launcher_on_two_machines_without_ssh(parts, first_stage, tmp_path):
    (tmp_path / "hosts").write_text("one slots=1\ntwo slots=1\n")
    log = train(parts, "pretrain", "by-hosts", *on_two_machines(HOSTFILE=str(tmp_path / "hosts")))
    check_same(parts, first_stage, "by-hosts", log)


@pytest.fixture(scope="module")
def second(parts, first_stage):
    """What the second stage is told besides: the first stage's projector and a compression."""
    projector = first_stage[0] / "mm_projector.bin"
    return {"PROJECTOR": str(projector), "COMPRESSION": str(ROOT / "configs/mini/r50.yaml")}


def test_second_stage(parts, second):
    """ZeRO-3: 16-bit weights, and a projector that was trained on, not begun anew."""
    log = train(parts, "finetune", "llava", second, flags=FLAGS)
    assert len(losses(log)) == STEPS and all(np.isfinite(losses(log)))
    assert load_file(parts / "llava" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    model = load_pretrained_model(str(parts / "llava"), None, "llava", device="cpu")[1]
    assert model.config.trained_with_compression["method"] == "libra"
    moved = [
        (model.state_dict()[name] - value).abs().max()
        for name, value in projector_of(parts / "llava-pretrain").items()
    ]
    assert 0 < max(moved) < 0.01


def test_adapters_on_two_machines(parts, second):
    """ZeRO-3 by torchrun; the adapters are added to the language model's weights."""
    log = train(parts, "finetune_lora", "llava-lora", *on_two_machines(NNODES="2", **second), flags=FLAGS)
    assert len(losses(log)) == STEPS and all(np.isfinite(losses(log)))
    merged = load_pretrained_model(
        str(parts / "llava-lora"), str(parts / "llama"), "llava-lora", device="cpu"
    )[1].state_dict()
    plain = load_file(parts / "llama" / "model.safetensors")
    changed = [name for name, value in plain.items() if not torch.equal(merged[name], value.float())]
    assert changed and all("_proj." in name for name in changed)


def test_what_is_wrong_is_said_once(parts, tmp_path):
    ((status, said),) = together(
        parts, ("finetune", FLAGS, environment(parts, "talks", tmp_path / "out", DATA="nowhere.json"))
    )
    assert (
        status == 2
        and not (tmp_path / "out").exists()
        and "Traceback" not in said
        and "torch.distributed" not in said
    )
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith("error: the data nowhere.json cannot be read")


def test_d5_second_stage_from_a_llava_checkpoint(parts, tmp_path):
    """It brings its projector, tower, template and settings along."""
    settings = {"MODEL": str(MINI), "VISION_TOWER": "", "GPUS": "1", "ZERO": "2"}
    ((status, said),) = together(
        parts, ("finetune", (), environment(parts, "talks", tmp_path / "out", **settings))
    )
    assert status == 0, said[-3000:]
    config, start = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", MINI))
    for name in (
        "conversation",
        "mm_vision_select_layer",
        "tokenizer_model_max_length",
        "image_aspect_ratio",
    ):
        assert config[name] == start[name], name
    assert len(losses(log_of(tmp_path / "out"))) == 2 * STEPS


def test_d5_what_goes_wrong_in_a_process_is_said_without_torchruns_traceback(parts, tmp_path):
    """A folder that holds another run is found by the processes, after the check."""
    settings = {"MODEL": str(MINI), "VISION_TOWER": "", "GPUS": "1", "ZERO": "2"}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text('{"run": {"--seed": 7}}')
    ((status, said),) = together(
        parts, ("finetune", (), environment(parts, "talks", tmp_path / "out", **settings))
    )
    assert (
        status == 2 and "error: --output_dir" in said and "--seed was 7" in said and "Traceback" not in said
    )
