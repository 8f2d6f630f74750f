"""Image files: read one into RGB whatever its format, gather many, and give each a name of its own."""

import contextlib
import hashlib
import logging
import os
import re
import stat
import sys
import threading
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from io import BufferedReader
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

MAX_PIXELS = 100_000_000  # width * height; 300 MB as RGB

# EPS would start Ghostscript on a stranger's program; of the others Pillow knows the name and cannot decode the pixels.
_REFUSED_FORMATS = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}

_TURNS = {  # EXIF orientation -> what shows the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_LABEL_BYTES = 150  # file systems allow 255; the rest is for what is put behind the label

# Python's last resort prints the errors of a logger nobody listens to; a handler that does nothing keeps Pillow's off
# the terminal and leaves them to whoever has set up logging.
logging.getLogger("PIL").addHandler(logging.NullHandler())

_filters = threading.Lock()


class ImageError(ValueError):
    """An image file that cannot be used: one line that names the file and says why."""


def read(path: str | Path) -> Image.Image:
    """Read an image file of any format that Pillow decodes as upright 8-bit RGB.

    The EXIF orientation is applied, transparency is laid over white, 16-bit grey is scaled (65535 becomes 255), and of
    an animation the first frame is taken. Embedded colour profiles are not applied, as networks are trained without.

    Args:
        path: The file. EPS, which is a program and not an image, is refused.

    Returns:
        Image of mode RGB without metadata, all of it in memory; the file is closed.

    Raises:
        ImageError: If the file is missing, no regular file, unreadable, broken, of a format that Pillow cannot
            decode, larger than `MAX_PIXELS` by its header, or holds grey values outside of 0..65535 (integers) or 0..1
            (floats). Nothing else is raised or printed, whatever the file holds.

    Example:
        >>> read("no such cat.jpg")
        Traceback (most recent call last):
            ...
        tsgb.images.ImageError: no such cat.jpg: no such file
    """
    Image.init()
    formats = [name for name in Image.ID if name not in _REFUSED_FORMATS]
    try:
        with _open(path) as file, _pillow_silenced():
            if not file.peek(1):
                raise _error(path, "is empty")
            image = Image.open(file, formats=formats)
            _check_size(path, image.size)
            with _libtiff_silenced() if image.format == "TIFF" else contextlib.nullcontext():
                image.load()
            _check_size(path, image.size)  # an icon may hold more than its header says
            upright, turn = _rgb(image), _turn(image)
            return upright if turn is None else upright.transpose(turn)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise _error(path, "not an image in a format that can be read") from error
    except Image.DecompressionBombError as error:
        raise _error(path, f"too large: more than {MAX_PIXELS} pixels in all") from error
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise _error(path, f"cannot be decoded: {str(error) or type(error).__name__}") from error


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits, reading it piece by piece.

    Raises:
        ImageError: If the file is missing, no regular file, or unreadable.

    Example:
        >>> sha256(__file__) == sha256(__file__)
        True
    """
    with _open(path) as file:
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise _error(path, error.strerror or str(error)) from error


def collect(paths: Sequence[str | Path]) -> list[Path]:
    """List the image files meant by files and folders, in the order given and each one once.

    A file stands for itself, also when it is missing or no image: `read` reports it. A folder stands for the files
    directly in it whose extension belongs to a format that `read` knows, sorted by name; hidden ones are passed over.

    Raises:
        ImageError: If a folder holds no image files or cannot be listed.

    Example:
        >>> [path.as_posix() for path in collect(["cat.png", "./cat.png", "dog.png"])]
        ['cat.png', 'dog.png']
    """
    Image.init()
    known = {
        suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN.keys() - _REFUSED_FORMATS
    }
    files: dict[str, Path] = {}
    for path in map(Path, paths):
        for file in _images_in(path, known) if os.path.isdir(path) else [path]:
            files.setdefault(os.path.realpath(file), file)
    return list(files.values())


def labels(paths: Sequence[Path]) -> list[str]:
    """Give every path a short name of its own, fit to name its output files.

    The name is the file's stem where no other file has it; otherwise the parent folders that tell the files apart are
    put before it, and the extension behind it for files of the same folder. Where that is still not enough, a number
    follows. Upper and lower case count as the same; characters that a file system may refuse become underscores.

    Returns:
        One label for each path, unique also where case is ignored, and of about 150 bytes at most.

    Example:
        >>> labels([Path("a/cat.png"), Path("b/cat.png"), Path("dog.png"), Path("owl.jpg"), Path("owl.png")])
        ['a-cat', 'b-cat', 'dog', 'owl-jpg', 'owl-png']
    """
    stems = [_clean(path.stem) for path in paths]
    groups = defaultdict(list)
    for index, stem in enumerate(stems):
        groups[_key(stem)].append(index)

    result = [""] * len(paths)
    taken: set[str] = set()
    for group in sorted(groups.values(), key=lambda group: len(group) > 1):  # unique stems first: they stay as they are
        names = [stems[group[0]]] if len(group) == 1 else _told_apart([paths[index] for index in group])
        for index, name in zip(group, names, strict=True):
            label, number = name, 1
            while _key(label) in taken:
                number += 1
                label = f"{name}-{number}"
            taken.add(_key(label))
            result[index] = label
    return result


@contextlib.contextmanager
def _open(path: str | Path) -> Iterator[BufferedReader]:
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise _error(path, "is a folder")
        if not stat.S_ISREG(mode):  # opening a pipe would wait, a device never end
            raise _error(path, "is not a regular file")
        file = open(path, "rb")  # noqa: SIM115  (closed below; errors of the caller's block must not be caught here)
    except FileNotFoundError as error:
        raise _error(path, "no such file") from error
    except PermissionError as error:
        raise _error(path, "no permission to read it") from error
    except (OSError, ValueError) as error:  # ValueError: a name no file can have
        raise _error(path, str(error)) from error
    with file:
        yield file


@contextlib.contextmanager
def _pillow_silenced() -> Iterator[None]:
    # Warning filters belong to the process: without the lock two threads would restore each other's.
    with _filters, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


@contextlib.contextmanager
def _libtiff_silenced() -> Iterator[None]:
    # libtiff writes its complaints to the terminal itself, so the terminal has to be taken away; not so while other
    # threads run, whose messages would be lost with them; daemons, such as a progress bar's watch, have none to lose.
    at_work = [thread for thread in threading.enumerate() if not thread.daemon]
    if len(at_work) > 1 or sys.__stderr__ is None:
        yield
        return
    terminal = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)


def _error(path: str | Path, reason: str) -> ImageError:
    name = str(path)
    return ImageError(f"{name if name.isprintable() else repr(name)}: {' '.join(reason.split())}")


def _check_size(path: str | Path, size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise _error(path, f"too large: {size[0]} x {size[1]} pixels, more than {MAX_PIXELS} in all")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _grey(image, 65535)
    elif image.mode == "F":
        image = _grey(image, 1)
    result = Image.new("RGB", image.size, "white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        result.paste(image.convert("RGB"), mask=image.getchannel("A"))
    else:
        result.paste(image.convert("RGB"))
    return result


def _grey(image: Image.Image, white: int) -> Image.Image:
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= white):  # NaN fails too
        raise ValueError(f"grey values from {low} to {high}, expected 0 to {white}")
    grey = np.rint(values * np.float32(255 / white)).astype(np.uint8)
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken EXIF data is no reason to refuse the pixels
        return None


def _images_in(folder: Path, suffixes: set[str]) -> list[Path]:
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes and path.is_file())
    except OSError as error:
        raise _error(folder, f"cannot be listed: {error.strerror or error}") from error
    files = [path for path in files if not path.name.startswith(".")]
    if not files:
        raise _error(folder, "holds no image files")
    return files


def _told_apart(paths: Sequence[Path]) -> list[str]:
    folders = [Path(os.path.abspath(path)).parent.parts[1:] for path in paths]
    crowd = Counter(folders)
    depth = 0  # how many parent folders it takes
    while depth < max(map(len, crowd)) and len({_key("-".join(_tail(folder, depth))) for folder in crowd}) < len(crowd):
        depth += 1
    names = []
    for path, folder in zip(paths, folders, strict=True):
        parts = [*_tail(folder, depth), path.stem]
        if crowd[folder] > 1:
            parts.append(path.suffix[1:])
        names.append(_clean("-".join(filter(None, parts))))
    return names


def _tail(folder: tuple[str, ...], depth: int) -> tuple[str, ...]:
    return folder[max(len(folder) - depth, 0) :]


def _key(label: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", label).casefold())


def _clean(name: str) -> str:
    name = "".join(c if c.isprintable() and c not in '<>:"/\\|?*' else "_" for c in name)
    name = name.encode()[-_LABEL_BYTES:].decode(errors="ignore").strip(" .") or "image"
    # Windows keeps these names for devices, whatever the extension.
    return f"_{name}" if re.match(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", name, re.IGNORECASE) else name
