"""Finished answers on disk, one JSON a line, so that a killed run goes on where it was."""

import fcntl
import json
import os
from pathlib import Path


class SampleLog:
    """An append-only JSONL of records keyed by (task, doc_id); one process at a time holds a file.

    Opening reads what is there. A torn last line, which a kill in mid-write leaves, is cut off; so is everything after
    a line that is not such a record. Of two records of one key the later counts.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b")
        fcntl.flock(self._file, fcntl.LOCK_EX)  # a worker of a killed run may still finish its last batch
        self._records: dict[tuple[str, int], dict] = {}
        self._file.seek(0)
        good = 0
        for line in self._file:
            try:
                if not line.endswith(b"\n"):
                    break
                record = json.loads(line)
                self._records[record["task"], record["doc_id"]] = record
            except (ValueError, KeyError, TypeError):
                break
            good += len(line)
        self._file.truncate(good)
        self._file.seek(good)

    def __len__(self) -> int:
        return len(self._records)

    def get(self, task: str, doc_id: int) -> dict | None:
        return self._records.get((task, doc_id))

    def append(self, records: list[dict]) -> None:
        """Write records (each with ``task`` and ``doc_id``) and return once they are on the disk."""
        self._file.write("".join(json.dumps(record) + "\n" for record in records).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._records.update({(record["task"], record["doc_id"]): record for record in records})

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "SampleLog":
        return self

    def __exit__(self, *exception) -> None:
        self.close()
