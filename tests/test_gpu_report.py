"""scripts/gpu_report.sh without a GPU: the commands that it would run are ones that the package takes."""

import os
import shlex
import shutil
import subprocess

import pytest

from libra.latency import arguments, methods, selectors
from libra.rows import Row, get_model
from libra.utils.provenance import REPOSITORY

SCRIPT = REPOSITORY / "scripts" / "gpu_report.sh"


def run(*options: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [shutil.which("bash"), str(SCRIPT), *options],
        capture_output=True,
        text=True,
        env={"PATH": os.defpath, **environment},
    )


@pytest.mark.parametrize("options", [("--dry-run",), ("--dry-run", "--quick")], ids=" ".join)
def test_every_command_is_taken(options):
    done = run(*options)
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line.partition(" > ")[0]) for line in done.stdout.splitlines()]
    latency = [line[line.index("libra.latency") + 1 :] for line in lines if "libra.latency" in line]
    outputs = [
        line[line.index(name) + 1] for line in latency for name in ("--json", "--plot") if name in line
    ]
    assert len(set(outputs)) == len(outputs) > 8
    for line in latency:
        args = arguments.parser().parse_args(line)
        arguments.check_arguments(args)
        row = Row.from_yaml(args.config)
        assert args.visual_tokens or get_model(row.model).visual_tokens
    assert ["python", "-m", "pytest", "-m", "gpu", "-q"] in lines
    modules = {line[2] for line in lines if line[:2] == ["python", "-m"]}
    assert {selectors.__name__, methods.__name__} <= modules
    assert any("--grow" in line for line in latency)


def test_without_a_gpu_it_says_so(tmp_path):
    for tool in ("dirname", "head"):  # and no nvidia-smi
        (tmp_path / tool).symlink_to(shutil.which(tool))
    done = run(PATH=str(tmp_path))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: no NVIDIA GPU was found; --dry-run shows what would run\n"
    done = run("--fast", PATH=str(tmp_path))
    assert done.returncode == 2 and "--fast is not an option" in done.stderr
