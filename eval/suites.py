"""What a table consists of: suites of row files, and what the harness calls the rows' tasks."""

from dataclasses import dataclass
from pathlib import Path

from .checkpoints import REPOSITORY

CONFIGS = REPOSITORY / "configs"
TASKS = Path(__file__).resolve().parent / "tasks"
BLIND = "blind"  # the row that is not a file: vanilla on grey images

# Suite → (folder below configs/, prefix of its files, title of the model).
SUITES = {
    "mini": ("mini", "", "embedded model"),
    "llava7b": ("", "llava7b_", "LLaVA-1.5-7B"),
    "llava13b": ("", "llava13b_", "LLaVA-1.5-13B"),
    "next8b": ("", "next8b_", "LLaVA-NeXT-8B"),
}
TABLES = {1: ("mini", "llava7b", "llava13b", "next8b")}
ROWS = {  # in the order of the tables
    "vanilla": "vanilla", "fastv": "FastV", "turbo": "Turbo", "r50": "Libra-Merging, 50%", "r67": "Libra-Merging, 67%",
    "random": "random (control)", "windowed_fastv": "windowed FastV (control)", BLIND: "vanilla, grey images (blind)",
}


@dataclass(frozen=True)
class Task:
    """name: in a row's file; harness: in lmms-eval; metric: the score's key; scale: to percent; title: its column."""

    name: str
    harness: str
    metric: str
    scale: float
    title: str


PAPER_TASKS = {
    task.name: task
    for task in (
        Task("gqa", "gqa", "exact_match", 100, "GQA"),
        Task("scienceqa_img", "scienceqa_img", "exact_match", 100, "ScienceQA"),
        Task("mme", "mme", "mme_perception_score", 1, "MME"),
        Task("mmbench_en_static", "mmbench_en_dev_static", "gpt_eval_score", 1, "MMBench-EN"),
        Task("mmbench_cn_static", "mmbench_cn_static", "gpt_eval_score", 1, "MMBench-CN"),
        Task("textvqa_ocr", "textvqa_ocr", "exact_match", 100, "TextVQA"),
    )
}


def get_task(name: str) -> Task:
    """The task a row's file names; ValueError with the known names for any other."""
    if name.startswith("mini_") and (TASKS / f"{name}.yaml").is_file():
        return Task(name, name, "exact_match", 100, name.removeprefix("mini_").replace("_", " "))
    if name not in PAPER_TASKS:
        known = [*sorted(path.stem for path in TASKS.glob("mini_*.yaml")), *PAPER_TASKS]
        raise ValueError(f"task {name} is unknown; use one of {', '.join(known)}")
    return PAPER_TASKS[name]


def row_files(suite: str) -> dict[str, Path]:
    """The suite's rows by short name (``r50``), in table order; files that the table does not know come last."""
    if suite not in SUITES:
        raise ValueError(f"suite {suite} is unknown; use one of {', '.join(SUITES)}")
    folder, prefix, _ = SUITES[suite]
    files = {path.stem.removeprefix(prefix): path for path in sorted((CONFIGS / folder).glob(f"{prefix}*.yaml"))}
    order = list(ROWS)
    return dict(sorted(files.items(), key=lambda item: (order.index(item[0]) if item[0] in order else len(order), item[0])))
