"""The package by itself: what the wheel and the source distribution hold, and everything from the wheel,
without a checkout."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import libra

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("mini/*.md")]
LEFT_OUT = (
    ".git",
    ".venv",
    "results",
    "runs",
    "checkpoints",
    "build",
    "dist",
)  # at the top of the repository


def setup_py() -> dict:
    return runpy.run_path(str(ROOT / "setup.py"), run_name="setup")


def test_the_version_stands_in_one_place():
    version = re.escape(libra.__version__)
    assert setup_py()["version"]() == libra.__version__
    for name in ("setup.py", "pyproject.toml", "CITATION.cff", "README.md", "requirements.in"):
        assert not re.search(
            rf"(?<![\d.<>=]){version}(?![\d.])", (ROOT / name).read_text(encoding="utf-8")
        ), name


def test_links_of_the_metadata_come_from_one_setting():
    setup = setup_py()
    assert setup["PROJECT_URL"] == "" and setup["readme"]() == (ROOT / "README.md").read_text(
        encoding="utf-8"
    )
    setup["readme"].__globals__["PROJECT_URL"] = "https://example.org/libra"
    links = re.findall(r"\]\(([^)]+)\)", setup["readme"]())
    assert len(links) > 10 and all(link.startswith(("https://", "#")) for link in links)
    assert "https://example.org/libra/blob/main/docs/plugin.md" in links


def test_no_page_installs_from_an_index_or_invents_an_address():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"pip install[^\n`]*libra-merging", text), page.name
        assert not re.search(r"(github|gitlab|huggingface)\.[a-z]+/[\w-]+/libra", text), page.name


def build(source: Path, kind: str, into: Path) -> Path:
    """A distribution of the sources in a folder: "sdist" or "wheel"."""
    into.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(into)!r}))"
    built = subprocess.run(
        [sys.executable, "-c", code], cwd=source, check=True, capture_output=True, text=True
    )
    return into / built.stdout.split()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    work = tmp_path_factory.mktemp("sdist")

    def left_out(folder: str, names: list[str]) -> set[str]:
        top = set(LEFT_OUT) if Path(folder) == ROOT else set()
        return top | {
            name for name in names if name == "__pycache__" or name.endswith((".egg-info", "_cache"))
        }

    shutil.copytree(ROOT, work / "source", ignore=left_out)
    return build(work / "source", "sdist", work / "dist")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built from the source distribution alone, as an installer does."""
    work = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(work, filter="data")
    (source,) = work.iterdir()
    return build(source, "wheel", work / "dist")


class Installed:
    """An environment of its own with the wheel in it; what it depends on is lent by the running one."""

    def __init__(self, folder: Path, wheel: Path):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
        self.python = folder / "env/bin/python"
        (self.packages,) = (folder / "env").glob("lib/python*/site-packages")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(self.packages)
        self.installed = {path.name for path in self.packages.iterdir()}
        lent = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
        (self.packages / "lent.pth").write_text("\n".join(lent) + "\n")
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()

    def run(self, *words: str | Path) -> str:
        """What a Python there prints, started in a folder that is not the checkout."""
        environment = {
            name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")
        }
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(self.elsewhere / "hub"), "OMP_NUM_THREADS": "1"}
        answer = subprocess.run(
            [self.python, *map(str, words)],
            cwd=self.elsewhere,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert answer.returncode == 0, answer.stderr
        return answer.stdout


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"), wheel)


@pytest.mark.slow
def test_the_source_distribution_holds_the_repository(sdist):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert set(listed.stdout.split("\n")) - {""} <= held


@pytest.mark.slow
def test_the_wheel_holds_two_packages_with_their_data(wheel, installed):
    assert {name for name in installed.installed if not name.endswith(".dist-info")} == {"libra", "llava"}
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        (metadata,) = (archive.read(name).decode() for name in held if name.endswith(".dist-info/METADATA"))
    rows = {
        f"libra/configs/{path.relative_to(ROOT / 'configs').as_posix()}"
        for path in (ROOT / "configs").rglob("*.yaml")
    }
    weights = {
        f"libra/mini/{path.relative_to(ROOT / 'mini').as_posix()}"
        for path in (ROOT / "mini/checkpoint").rglob("*.*")
    }
    code = {
        path.relative_to(ROOT).as_posix()
        for name in ("libra", "llava")
        for path in (ROOT / name).rglob("*.py")
    }
    tasks = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "libra/lmms/tasks").iterdir() if path.is_file()
    }
    shown = {path.relative_to(ROOT).as_posix() for path in (ROOT / "llava/serve/static").iterdir()}
    others = {"libra/py.typed", "llava/py.typed", "libra/models.yaml"}
    assert rows | weights | code | tasks | shown | others <= held
    assert f"Version: {libra.__version__}\n" in metadata and not re.search(
        r"^(Home-page|Project-URL):", metadata, re.MULTILINE
    )
    assert wheel.stat().st_size < 15_000_000


@pytest.mark.slow
def test_the_package_works_from_any_folder(installed):
    place = (
        "import libra, llava, libra.rows; print(libra.__file__, llava.__file__, "
        "*libra.rows.shipped_rows().values())"
    )
    assert all(path.startswith(str(installed.packages)) for path in installed.run("-c", place).split())
    surroundings = installed.elsewhere.parent  # somebody's own checkout, with an environment in it
    for words in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-q", "--allow-empty", "-m", "a"],
    ):
        subprocess.run(["git", *words], cwd=surroundings, check=True)
    assert installed.run("-c", "from libra.utils.provenance import commit; print(commit())") == "unknown\n"
    flops = installed.run("-m", "libra.flops", "--config", "llava7b_r50")
    assert "1.78 T" in flops and "47%" in flops


@pytest.mark.slow
def test_the_readmes_example_runs(installed):
    """As it stands, next to the picture that it names."""
    example = re.search(
        r"```python\n(import libra\n.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    shutil.copytree(ROOT / "docs" / "images", installed.elsewhere / "docs" / "images")
    (installed.elsewhere / "example.py").write_text(example[1])
    answer, _, summary = installed.run("example.py").strip().partition(" | ")
    assert answer and re.search(r"256 visual tokens became \d+ .* of their FLOPs; KV cache", summary)


@pytest.mark.slow
def test_lmms_eval_scores_the_embedded_model(installed):
    folder = installed.run("-m", "libra.lmms", "--task-folder").strip()
    flags = ["--tasks", "mini_reading", "--limit", "4", "--device", "cpu", "--model_args", "config=mini/r50"]
    for command in (["lmms_eval", "--model", "libra", "--include_path", folder], ["libra.lmms"]):
        table = installed.run("-m", *command, *flags)
        (score,) = re.findall(
            r"^\|mini_reading *\|.*?\|exact_match *\|[^|]*\| *([\d.]+) *\|", table, re.MULTILINE
        )
        assert 0 <= float(score) <= 1


@pytest.mark.slow
def test_run_llava_answers_by_the_models_name(installed):
    code = "from PIL import Image; Image.new('RGB', (96, 96)).save('black.png')"
    installed.run("-c", code)
    answer = installed.run(
        "-m",
        "llava.eval.run_llava",
        "--model-path",
        "mini",
        "--image-file",
        "black.png",
        "--compression",
        "mini/r50",
        "--query",
        "how many digits are there ?",
    )
    assert answer.strip()
