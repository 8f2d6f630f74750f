"""The journal of a bench: one JSON line for each image and method, written as it goes, read again after a kill."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Key", "Record", "alone", "append", "key", "mend", "read"]

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
    """Cut off a last line that a kill has torn."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Keep other benches out of a folder, where the system can lock files.

    Raises:
        RuntimeError: another bench writes there.
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
