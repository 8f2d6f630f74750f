"""Reading annotation files that strangers wrote: JSON and XML, within bounds, with errors of one line."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from .dataset import DataError

__all__ = ["inside", "read_json", "read_xml"]

_XML_BYTES = 2_000_000  # an image's annotation has some thousand


def inside(name: object) -> str | None:
    """Return a file name from an annotation as a path below the image folder; None if it is none or leads out.

    Example:
        >>> inside("./val//cat.jpg"), inside("../cat.jpg"), inside("/cat.jpg"), inside(7)
        ('val/cat.jpg', None, None, None)
    """
    if not isinstance(name, str) or "\0" in name:
        return None
    path = PureWindowsPath(name)  # knows the separators of every system
    plain = PurePosixPath(name).as_posix()
    return None if path.anchor or ".." in path.parts or plain == "." else plain


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        DataError: If it cannot be read, is no JSON, or holds something else.

    Example:
        >>> read_json(Path("no such.json"))
        Traceback (most recent call last):
            ...
        tsgb.data.dataset.DataError: no such.json: cannot be read: No such file or directory
    """
    try:
        record = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{file}: expected a JSON object, got a {type(record).__name__}")
    return record


def read_xml(file: Path) -> ElementTree.Element:
    """Read a small XML file; one with a document type is refused, as its entities could grow without end.

    Returns:
        The root element.

    Raises:
        ValueError: If it cannot be read, is too large, refused or not well-formed; one line that names the file.

    Example:
        >>> read_xml(Path("no such.xml"))
        Traceback (most recent call last):
            ...
        ValueError: no such.xml: cannot be read: No such file or directory
    """
    try:
        with open(file, "rb") as stream:
            data = stream.read(_XML_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror or error}") from error
    if len(data) > _XML_BYTES:
        raise ValueError(f"{file}: larger than {_XML_BYTES} bytes, which no annotation is")
    try:
        return ElementTree.fromstring(data, ElementTree.XMLParser(target=_Plain()))
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # LookupError: an encoding that is none
        raise ValueError(f"{file}: not an XML annotation: {error}") from error


class _Plain(ElementTree.TreeBuilder):
    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("it has a document type, which annotations have not")
