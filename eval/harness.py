"""What a worker computes: one cell through lmms-eval, with a model that stays loaded between cells."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from libra.lmms import TASKS
from libra.utils import plugins

from . import samples as samples_
from .cells import Cell, check_unchanged, what_is_loaded
from .checkpoints import CheckpointError
from .own import Own
from .suites import Task, get_task


@dataclass(frozen=True)
class Settings:
    """How to compute, which changes no answer beyond rounding: output folder, device, threads and batch size;
    the dtype; the user's own modules that rows need, and models and tasks of one's own; whether a task is one
    of lmms-eval's own (``defaults``)."""

    output: str
    device: str
    threads: int
    batch_size: int
    dtype: str
    online: bool
    plugins: tuple[str, ...] = ()
    own: Own = Own()
    defaults: bool = True


FEATURES = 256 * 2**20  # bytes of the embedded benchmark's features that a worker keeps between rows


class Harness:
    """Imports the harness once, loads each checkpoint once; called with a cell it returns the cell's
    result."""

    def __init__(self, settings: Settings):
        if not settings.online:  # before the harness is imported, which reads them
            os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
            os.environ["HF_DATASETS_CACHE"] = str(Path(settings.output) / "cache")
        os.environ["TQDM_DISABLE"] = "1"  # the runner draws the one bar
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        import torch
        from lmms_eval.tasks import TaskManager

        torch.set_num_threads(settings.threads)
        for name in settings.plugins:
            plugins.load(name)
        settings.own.apply()
        self.settings, self.model, self.checkpoint, self.loaded = settings, None, None, {}
        folders = [str(TASKS), *([str(settings.own.tasks)] if settings.own.tasks else [])]
        self.tasks = TaskManager(verbosity="ERROR", include_path=folders, include_defaults=settings.defaults)

    def __call__(self, cell: Cell, on_samples: Callable[[int], None]) -> dict:
        """The result of a cell, as :func:`summary` or :func:`eval.turns.timing` makes it; ``on_samples``
        hears of samples.

        Raises ValueError where checkpoint, code or questions are no longer those of the cell.
        """
        from libra.lmms.lmms_libra import is_answer
        from libra.lmms.samples import SampleLog

        from .turns import InTurns, is_timing, timing

        task, model = get_task(cell.task), self.load(cell)
        check_unchanged(cell, self.loaded)
        # Of other benchmarks too few would fit, and what is timed has the vision tower's time in it.
        model.engine.remember_pictures(FEATURES if cell.data is not None and not cell.turns else 0)
        path, is_whole = cell.samples_path(Path(self.settings.output)), is_timing if cell.turns else is_answer
        with SampleLog(path, cell.config_hash, is_whole) as log:
            if cell.turns:
                timed = InTurns(model, dict(cell.turns), log, on_samples)
                self._evaluate(cell, task, timed)
                return timing(timed)
            model.set_row(cell.spec, cell.blind, trace=True)
            model.sample_log, model.on_samples = log, on_samples
            results = self._evaluate(cell, task, model)
        return self._result(results, task, list(model.records.values()), cell.spec.compression.layers)

    @staticmethod
    def _result(results: dict, task: Task, records: list[dict], layers: Sequence[int] = ()) -> dict:
        """A cell's result from what lmms-eval returned and the model's records."""
        found = sorted(results["samples"][task.harness], key=lambda sample: sample["doc_id"])
        if not task.metric:
            task = scored(task, results["configs"][task.harness]["metric_list"][0]["metric"], found)
        score = results["results"][task.harness][f"{task.metric},none"]
        return summary(float(score), task, found, records, layers)

    def _evaluate(self, cell: Cell, task: Task, model) -> dict:
        from lmms_eval.evaluator import simple_evaluate
        from tenacity import RetryError

        from .data import cause

        asked: str | dict = task.harness
        if cell.data is not None:
            asked = {"task": task.harness, "dataset_kwargs": {"data_files": {"test": cell.data[0]}}}
        folder = Path(self.settings.output) / "harness" / cell.name
        try:
            return simple_evaluate(
                model=model,
                tasks=[asked],
                task_manager=self.tasks,
                limit=cell.limit,
                bootstrap_iters=0,
                log_samples=True,
                verbosity="ERROR",
                cli_args=SimpleNamespace(output_path=str(folder), process_with_media=True),
            )
        except RetryError as error:  # the harness tries to load a data set several times
            mend = f"python -m eval.data --tasks {task.name} --yes downloads it"
            raise ValueError(
                f"the data of task {task.name} cannot be loaded ({cause(error)}); {mend}"
            ) from error

    def load(self, cell: Cell):
        """The model of a cell's checkpoint; the one that is there already where it is the same."""
        from libra.lmms.lmms_libra import LibraModel

        if self.checkpoint != cell.checkpoint:
            self.model = None  # two large models do not fit side by side
            settings = self.settings
            try:
                self.model = LibraModel(
                    cell.spec,
                    cell.checkpoint,
                    device=settings.device,
                    batch_size=settings.batch_size,
                    dtype=settings.dtype,
                )
            except (ValueError, OSError) as error:
                raise CheckpointError(str(error)) from error  # of no use to the other cells either
            self.checkpoint, self.loaded = cell.checkpoint, what_is_loaded(cell.checkpoint)
        return self.model


def scored(task: Task, metric: str, samples: list[dict]) -> Task:
    """A task of somebody else's with its metric, in percent where all samples' values are in [0, 1]."""
    values = [sample.get(metric) for sample in samples]
    shares = all(isinstance(value, (int, float)) and 0 <= value <= 1 for value in values)
    return replace(task, metric=metric, scale=100 if shares else 1)


def summary(
    score: float, task: Task, samples: list[dict], records: list[dict], layers: Sequence[int] = ()
) -> dict:
    """A cell's result from the harness's samples and the model's records.

    ``correct`` lists each sample's score in [0, 1] by document, and the standard error is sqrt(p(1-p)/n) for
    right or wrong answers, else that of the mean; both are None for metrics that are not a mean over samples
    (MME, MMBench). ``groups`` has the same of each part of the benchmark that is a column; ``trace`` is that
    of :func:`trace_summary`.
    """
    values = [_correct(sample.get(task.metric), task) for sample in samples]
    whole = None not in values
    if task.sample and values:
        score = float(np.mean(values))
    groups = {}
    for group in task.groups:
        part = [
            value for value, sample in zip(values, samples) if sample[task.metric][task.group_by] == group
        ]
        if part and whole:
            groups[group] = {
                "score": 100 * float(np.mean(part)),
                "stderr": 100 * _stderr(part),
                "n": len(part),
            }
    tokens = [record["tokens"] for record in records if record["tokens"]]
    return {
        "status": "ok",
        "score": task.scale * score,
        "stderr": (100 if task.groups else task.scale) * _stderr(values) if whole else None,
        "n": len(samples),
        "correct": values if whole else None,
        "groups": groups,
        "tokens_per_layer": [round(float(layer), 3) for layer in np.mean(tokens, axis=0)] if tokens else None,
        "trace": trace_summary([record["trace"] for record in records if record.get("trace")], layers),
        "seconds": sum(record["seconds"] for record in records),
    }


def _correct(value, task: Task) -> float | None:
    """A sample's score in [0, 1]; None where the metric is not a mean of such scores."""
    if task.sample:
        return getattr(samples_, task.sample)(value)
    if task.groups and isinstance(value, dict):
        value = value.get("score")
    return float(value) if isinstance(value, (int, float)) else None


def _stderr(values: list[float]) -> float:
    return float(np.std(values)) / len(values) ** 0.5  # for zeros and ones this is sqrt(p(1-p)/n)


def trace_summary(traces: list[list[list]], layers: Sequence[int]) -> list[dict]:
    """Of each compression layer over the samples: the mean of the samples' mean s^max (Table 4's Sim) and of
    the share of the non-target tokens that went into the compensation token, each with its standard error,
    and ``histogram``: how many samples have a share in each of 20 equal bins of [0, 1]. Sim is None where the
        merge does not ask for similarities.

    traces: of each sample, of each compression layer [mean s^max, share], with None where there is none.
    """
    stages = []
    for number, layer in enumerate(layers if traces else ()):
        stage: dict = {"layer": layer}
        for name, place in (("similarity", 0), ("share", 1)):
            values = [trace[number][place] for trace in traces if trace[number][place] is not None]
            stage[name] = float(np.mean(values)) if values else None
            stage[f"{name}_stderr"] = _stderr(values) if values else None
        shares = [trace[number][1] for trace in traces if trace[number][1] is not None]
        stage["histogram"] = np.histogram(shares, bins=20, range=(0, 1))[0].tolist()
        stages.append(stage)
    return stages
