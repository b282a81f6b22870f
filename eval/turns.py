"""Time and memory of a table's rows: each sample is answered by all rows in turns, so a busy moment of the
machine hits all."""

from collections.abc import Callable

import torch
from lmms_eval.api.model import lmms

from libra.lmms.lmms_libra import LibraModel, is_number
from libra.lmms.samples import SampleLog
from libra.rows import Row
from libra.utils.timing import in_order

from .data import cause

TAKEN = ("seconds", "cache_bytes", "peak_bytes")  # what a record holds of each row; a CPU has no peak


class InTurns(lmms):
    """A model for the harness that lets ``rows`` answer each request, one at a time, and notes what each
    took.

    What a row takes spans everything from the harness's image to the text. The row that begins changes from
    sample to sample. A row that cannot run on this machine is in ``failed`` with the reason, and the others
    are timed.
    """

    is_simple = True

    def __init__(
        self, model: LibraModel, rows: dict[str, Row], log: SampleLog, on_samples: Callable[[int], None]
    ):
        super().__init__()
        self.model, self.rows, self.log, self.on_samples = model, rows, log, on_samples
        self.device = model.device
        self.failed: dict[str, str] = {}
        # Of each sample {task, doc_id, seconds, cache_bytes, peak_bytes}, the figures by row.
        self.records: list[dict] = []

    def clean(self) -> None:
        """Keep the model, as LibraModel does."""

    def loglikelihood(self, requests):
        return self.model.loglikelihood(requests)

    def generate_until_multi_round(self, requests):
        return self.model.generate_until_multi_round(requests)

    def generate_until(self, requests) -> list[str]:
        """The first row's answers; the table's scores come from its ordinary cells."""
        self.model.task_dict, self.model.sample_log, self.model.on_samples = (
            self.task_dict,
            None,
            lambda count: None,
        )
        for name, row in self.rows.items():  # warm-up: the first call of a kind is slower
            try:
                self._answer(row, requests[0])
            except (ValueError, ImportError, RuntimeError, NotImplementedError) as error:
                self.failed[name] = cause(error)
        names = [name for name in self.rows if name not in self.failed]
        for number, request in enumerate(requests):
            doc_id, task = int(request.args[3]), request.args[4]
            record = self.log.get(task, doc_id)
            if record is None or any(set(record[key]) != set(names) for key in TAKEN):
                taken = {name: self._answer(self.rows[name], request) for name in in_order(number, names)}
                record = {"task": task, "doc_id": doc_id}
                for key in TAKEN:
                    record[key] = {name: taken[name][key] for name in names}
                self.log.append([record])
            self.records.append(record)
            self.on_samples(len(self.rows))
        return [""] * len(requests)

    def _answer(self, row: Row, request) -> dict:
        self.model.set_row(row)
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        self.model.generate_until([request])
        (record,) = self.model.records.values()
        peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else None
        return {"seconds": record["seconds"], "cache_bytes": record["cache_bytes"], "peak_bytes": peak}


def is_timing(record: dict) -> bool:
    """Whether a logged record has what :func:`timing` needs of a sample."""
    parts = [record.get(key) for key in TAKEN]
    if not all(isinstance(part, dict) for part in parts):
        return False
    return all(
        is_number(value) or (part is parts[-1] and value is None) for part in parts for value in part.values()
    )


def timing(timed: InTurns) -> dict:
    """The result of a cell of turns: of each row the seconds of each sample, the mean bytes of the KV cache
    at the end of an answer, the peak of the device's memory (None on a CPU), or the reason why it did not
    run."""
    rows: dict[str, dict] = {name: {"reason": reason} for name, reason in timed.failed.items()}
    for name in timed.rows:
        if name in rows:
            continue
        cache = [record["cache_bytes"][name] for record in timed.records]
        peaks = [
            record["peak_bytes"][name] for record in timed.records if record["peak_bytes"][name] is not None
        ]
        rows[name] = {
            "seconds": [round(record["seconds"][name], 6) for record in timed.records],
            "cache_bytes": sum(cache) / len(cache),
            "peak_bytes": max(peaks, default=None),
        }
    return {
        "status": "ok",
        "score": None,
        "stderr": None,
        "n": len(timed.records),
        "correct": None,
        "turns": rows,
        "seconds": sum(sum(record["seconds"].values()) for record in timed.records),
    }
