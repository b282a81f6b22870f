"""lmms-eval's own client of OpenAI-compatible servers, with answers that are kept from a killed run to the
next."""

import json
import time
from types import SimpleNamespace
from typing import Any

from lmms_eval.models.simple.openai import OpenAICompatible

from libra.identity import digest
from libra.lmms.lmms_libra import blinded
from libra.lmms.models_base import cut

FAILED = "[LMMS_EVAL_REQUEST_FAILED"  # how the client's answer begins where there is none


class ServedModel(OpenAICompatible):
    """Answers of a server.

    sees: ``log``, the SampleLog of finished answers; ``on_samples``, told about every finished batch;
    ``blind``, whether pictures are grey; ``tokens``, the visual tokens by layer that a record tells.
    """

    sees: Any
    is_simple = True

    def __init__(self, server, key: str, batch_size: int):
        super().__init__(
            model_version=server.model,
            base_url=f"{server.url}/v1",
            api_key=key,
            max_retries=1,
            num_concurrent=batch_size,
            batch_size=batch_size,
            prefix_aware_queue=False,
        )
        self.records: dict[tuple[str, int], dict] = {}

    def clean(self) -> None:
        """Nothing lies in this process."""

    def generate_until(self, requests) -> list[str]:
        """The answers in the order of ``requests``; those that the log has are not asked for again.

        Raises ValueError where the client has no answer.
        """
        self.records = {}
        waiting = []
        for request in requests:
            record = self._logged(request)
            if record is None:
                waiting.append(request)
            else:
                self.records[record["task"], record["doc_id"]] = record
        if len(requests) > len(waiting):
            self.sees.on_samples(len(requests) - len(waiting))
        for start in range(0, len(waiting), self.batch_size):
            self._finish(waiting[start : start + self.batch_size])
        return [self.records[task, doc_id]["answer"] for task, doc_id in map(_name, requests)]

    def _logged(self, request) -> dict | None:
        record = self.sees.log.get(*_name(request))
        return record if record is not None and record["asked"] == _asked(request) else None

    def _finish(self, batch: list) -> None:
        """Ask a batch at once, and log its answers."""
        started = time.perf_counter()
        shown = [self._blinded(request) for request in batch] if self.sees.blind else batch
        answers = [answer.text for answer in super().generate_until(shown)]
        failed = next((answer for answer in answers if answer.startswith(FAILED)), None)
        if failed:
            raise ValueError(f"the server gave no answer: {failed}")
        seconds = (time.perf_counter() - started) / len(batch)
        records = []
        for request, answer in zip(batch, answers):
            task, doc_id = _name(request)
            until = request.args[1].get("until") or []
            text = cut(answer, [until] if isinstance(until, str) else list(until))
            own = {"task": task, "doc_id": doc_id, "asked": _asked(request), "answer": text}
            told = {"tokens": self.sees.tokens, "cache_bytes": 0, "trace": [], "seconds": seconds}
            records.append({**own, **told})
        self.sees.log.append(records)
        self.records.update({(record["task"], record["doc_id"]): record for record in records})
        self.sees.on_samples(len(records))

    def _blinded(self, request) -> SimpleNamespace:
        text, options, doc_to_visual, *place = request.args

        def grey(document):
            return blinded(doc_to_visual(document))

        return SimpleNamespace(args=(text, options, grey, *place))


def _name(request) -> tuple[str, int]:
    """Task and number of the document."""
    return request.args[4], int(request.args[3])


def _asked(request) -> str:
    """A digest of the prompt and of how it is to be answered."""
    text, options = request.args[0], json.loads(json.dumps(request.args[1], default=str))
    return digest([text, options])[:12]
