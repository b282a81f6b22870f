"""What a worker computes: one cell through lmms-eval, with a model that stays loaded between cells."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from .cells import Cell
from .checkpoints import CheckpointError


@dataclass(frozen=True)
class Settings:
    """How to compute, which changes no answer beyond rounding: output folder, device, threads and batch size; and the dtype."""

    output: str
    device: str
    threads: int
    batch_size: int
    dtype: str
    online: bool


class Harness:
    """Imports the harness once, loads each checkpoint once; called with a cell it returns the cell's result."""

    def __init__(self, settings: Settings):
        if not settings.online:  # before the harness is imported, which reads them
            os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
            os.environ["HF_DATASETS_CACHE"] = str(Path(settings.output) / "cache")
        os.environ["TQDM_DISABLE"] = "1"  # the runner draws the one bar
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        import torch
        from lmms_eval.tasks import TaskManager

        from .suites import TASKS

        torch.set_num_threads(settings.threads)
        self.settings, self.model, self.checkpoint = settings, None, None
        self.tasks = TaskManager(verbosity="ERROR", include_path=str(TASKS), include_defaults=settings.online)

    def __call__(self, cell: Cell, on_samples: Callable[[int], None]) -> dict:
        """The result of a cell, as :func:`summary` makes it; ``on_samples`` hears of finished samples."""
        from lmms_eval.evaluator import simple_evaluate

        from .samples import SampleLog
        from .suites import get_task

        task = get_task(cell.task)
        output = Path(self.settings.output)
        model = self._model(cell)
        asked: str | dict = task.harness
        if cell.data is not None:
            asked = {"task": task.harness, "dataset_kwargs": {"data_files": {"test": cell.data}}}
        with SampleLog(cell.samples_path(output)) as log:
            model.sample_log, model.on_samples = log, on_samples
            results = simple_evaluate(
                model=model, tasks=[asked], task_manager=self.tasks, limit=cell.limit, bootstrap_iters=0, log_samples=True,
                verbosity="ERROR",
                cli_args=SimpleNamespace(output_path=str(output / "harness" / cell.name), process_with_media=True),
            )
        score = results["results"][task.harness][f"{task.metric},none"]
        samples = sorted(results["samples"][task.harness], key=lambda sample: sample["doc_id"])
        return summary(float(score), task.metric, task.scale, samples, list(model.records.values()))

    def _model(self, cell: Cell):
        from libra.config import Row

        from .lmms_libra import LibraModel

        if self.checkpoint != cell.checkpoint:
            self.model = None  # two large models do not fit side by side
            settings = self.settings
            try:
                self.model = LibraModel(
                    cell.config, cell.checkpoint, device=settings.device, batch_size=settings.batch_size, dtype=settings.dtype,
                )
            except (ValueError, OSError) as error:
                raise CheckpointError(str(error)) from error  # of no use to the other cells either
            self.checkpoint = cell.checkpoint
        self.model.set_row(Row.from_yaml(cell.config), cell.blind)
        return self.model


def summary(score: float, metric: str, scale: float, samples: list[dict], records: list[dict]) -> dict:
    """A cell's result from the harness's samples and the model's records.

    ``correct`` lists each sample's score in [0, 1] by document, and the standard error is sqrt(p(1-p)/n) for right or
    wrong answers, else that of the mean; both are None for metrics that are not a mean over samples (MME, MMBench).
    """
    values = [sample.get(metric) for sample in samples]
    correct, stderr = None, None
    if all(isinstance(value, (int, float)) for value in values):
        correct = [float(value) for value in values]
        stderr = scale * float(np.std(correct)) / len(correct) ** 0.5  # for zeros and ones this is sqrt(p(1-p)/n)
    tokens = [record["tokens"] for record in records if record["tokens"]]
    return {
        "status": "ok", "score": scale * score, "stderr": stderr, "n": len(samples), "correct": correct,
        "tokens_per_layer": [round(float(layer), 3) for layer in np.mean(tokens, axis=0)] if tokens else None,
        "seconds": sum(record["seconds"] for record in records),
    }
