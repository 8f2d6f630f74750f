"""The journal of a bench: one JSON line for each image and method, written as it goes, read again after a kill."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["Key", "Record", "append", "key", "mend", "read"]

Record = dict[str, Any]
Key = tuple[str, str]


def key(record: Record) -> Key:
    """What a record is about: the unit (a picture or a grid) and the method, "" for what is said of the unit itself."""
    return record["unit"], record["method"]


def append(path: Path, records: Iterable[Record]) -> None:
    """Write records behind those of a file, each a line, all at once: several processes may do so at a time.

    Raises:
        ValueError: a record holds NaN or infinity. OSError: the file cannot be written.
    """
    lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode()
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        while lines:
            lines = lines[os.write(file, lines) :]
    finally:
        os.close(file)


def read(path: Path) -> Iterator[Record]:
    """Read the records of a file; what is no whole line is left out.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "records.jsonl"
        >>> append(path, [{"unit": "a.png", "method": "tsgb"}])
        >>> _ = path.open("a").write('{"unit": "b.p')
        >>> [key(record) for record in read(path)]
        [('a.png', 'tsgb')]
    """
    with open(path, "rb") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:  # torn by a kill
                continue


def mend(path: Path) -> None:
    """End a line that a kill has torn, so that the next record begins a line of its own."""
    with open(path, "rb+") as file:
        if file.seek(0, 2) and (file.seek(-1, 2), file.read(1))[1] != b"\n":
            file.write(b"\n")
