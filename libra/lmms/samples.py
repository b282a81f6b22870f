"""Finished answers on disk, one JSON a line, so that a killed run goes on where it was."""

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path

from libra.utils.files import flush_folder, make_folder


class SampleLog:
    """An append-only JSONL of records keyed by (task, doc_id); one process at a time holds a file.

    Opening reads what is there. A line that is not such a record, torn or edited, is passed over, and its
    answer is computed again; a torn last line is cut off. Of two records of one key the later counts.

    Args:
        settings: the digest of all that the answers depend on. Records carry it; those that carry another are
            passed over.
        is_whole: whether a record has what its reader needs.
    """

    def __init__(self, path: str | Path, settings: str, is_whole: Callable[[dict], bool]):
        self.path, self.settings = Path(path), settings
        make_folder(self.path.parent)
        self._file = open(self.path, "a+b")
        flush_folder(self.path.parent)
        fcntl.flock(self._file, fcntl.LOCK_EX)  # a worker of a killed run may still finish its last batch
        self._records: dict[tuple[str, int], dict] = {}
        self._file.seek(0)
        for line in self._file:
            record = _parse(line)
            if record is not None and record.get("settings") == settings and is_whole(record):
                self._records[record["task"], record["doc_id"]] = record
            if not line.endswith(b"\n"):
                self._end(line, keep=record is not None)

    def _end(self, last: bytes, keep: bool) -> None:
        """Have the file end with a whole line."""
        if keep:
            self._file.write(b"\n")
        else:
            self._file.truncate(self._file.tell() - len(last))

    def __len__(self) -> int:
        return len(self._records)

    def get(self, task: str, doc_id: int) -> dict | None:
        return self._records.get((task, doc_id))

    def append(self, records: list[dict]) -> None:
        """Write records (each with ``task`` and ``doc_id``) and return once they are on the disk."""
        whole = [{**record, "settings": self.settings} for record in records]
        self._file.write("".join(json.dumps(record) + "\n" for record in whole).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._records.update({(record["task"], record["doc_id"]): record for record in whole})

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "SampleLog":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _parse(line: bytes) -> dict | None:
    """A line's record; None for a line that is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    named = (
        isinstance(record, dict)
        and isinstance(record.get("task"), str)
        and isinstance(record.get("doc_id"), int)
    )
    return record if named else None
