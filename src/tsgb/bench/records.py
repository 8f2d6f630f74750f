"""The journal of a bench: one JSON line for each image and method. A killed bench resumes from it."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Key", "Record", "append", "key", "lock", "read", "truncate_partial_line"]

Record = dict[str, Any]
Key = tuple[str, str]


def key(record: Record) -> Key:
    """Return what a record is about: the unit (an image or a grid) and the method; "" for notes on the unit itself."""
    return record["unit"], record["method"]


def append(path: Path, records: Iterable[Record]) -> None:
    """Append records to a file, one line each, in one write, so that several processes may append at a time.

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
    """Read the records of a file. Incomplete lines are skipped.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "records.jsonl"
        >>> append(path, [{"unit": "a.png", "method": "tsgb-fused"}])
        >>> _ = path.open("a").write('{"unit": "b.p')
        >>> [key(record) for record in read(path)]
        [('a.png', 'tsgb-fused')]
    """
    with open(path, "rb") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:  # written in part by a killed process
                continue


def truncate_partial_line(path: Path) -> None:
    """Remove a last line that a killed process wrote in part."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """Lock a folder against other benches, on systems that can lock files.

    Raises:
        RuntimeError: another bench writes to the folder.
    """
    try:
        import fcntl
    except ImportError:  # on Windows
        yield
        return
    with open(out / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RuntimeError(f"another bench writes to {out}: wait for it, or choose another --out") from error
        yield
