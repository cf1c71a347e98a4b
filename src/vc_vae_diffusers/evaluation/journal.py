"""What a run has measured so far, on disk, so that a killed run continues where it was.

One folder a model, one file a process, one line a sample. A line is written and synced before the next sample starts; a
line cut short by a kill is dropped when the journal is read, and its sample is measured again.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, BinaryIO

from ..files import write_json, write_whole


class Journal:
    """Append-only records of one model.

    Args:
        folder: of this model; created by `open`.
        header: everything a record depends on. A journal with another header is not continued.
    """

    def __init__(self, folder: Path, header: dict[str, Any]):
        self.folder = folder
        self.header = header
        self._stream: BinaryIO | None = None

    def create(self) -> None:
        """Start the journal, or check that the one on disk is of the same run. Called by one process, before the others.

        Raises:
            ValueError: if it belongs to another run, naming what differs.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "header.json"
        if not path.exists():
            write_json(path, self.header, indent=1)
            return
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = sorted(key for key in found.keys() | self.header.keys() if found.get(key) != self.header.get(key))
        if differing and not self.measured():  # nothing is lost
            self.remove()
            self.create()
        elif differing:
            raise ValueError(
                f"{self.folder} holds an unfinished run with another {', '.join(differing)}, whose numbers cannot be "
                "mixed with new ones; remove that folder to start again, or write the result elsewhere"
            )

    def open(self, process: int) -> None:
        """Open this process's file for appending, without the torn last line of a killed run."""
        path = self.folder / f"process-{process}.jsonl"
        if path.exists():
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) != len(content):
                write_whole(path, whole)
        self._stream = path.open("ab")

    def append(self, record: dict[str, Any]) -> None:
        """Write a record and wait until it is on disk."""
        assert self._stream is not None, "open() comes before append()"
        self._stream.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close this process's file."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def records(self) -> dict[str, dict[str, Any]]:
        """All whole records by sample, of all processes that ever wrote here."""
        records: dict[str, dict[str, Any]] = {}
        for path in sorted(self.folder.glob("process-*.jsonl")):
            content = path.read_bytes()
            for line in content[: content.rfind(b"\n") + 1].splitlines():
                record = json.loads(line)
                records.setdefault(record["sample"], record)
        return records

    def measured(self) -> bool:
        """Whether there is more than samples that were left out."""
        return any("skipped" not in record for record in self.records().values())

    def remove(self) -> None:
        """Delete the journal, once its records are in a result file."""
        for path in self.folder.glob("process-*.jsonl"):
            path.unlink()
        (self.folder / "header.json").unlink()
        self.folder.rmdir()


def file_name(label: str) -> str:
    """A label as a file name, readable and unique: characters outside A-Z, a-z, 0-9, `.`, `_`, `-` are written as `%XX`."""
    name = re.sub(r"[^A-Za-z0-9._-]", lambda match: "".join(f"%{byte:02X}" for byte in match.group().encode()), label)
    return name if name.strip(".") else name.replace(".", "%2E")
