"""Whether a data set is still the same."""

import hashlib
from pathlib import Path

__all__ = ["fingerprint"]

_READ = {".json", ".xml", ".txt", ".npy"}  # what is read whole; of images the size tells enough


def fingerprint(path: Path) -> str:
    """Digest a data set: the names and sizes of all files below a folder, and the contents of annotations and maps.

    Args:
        path: A folder, or a single file, which is read whole.

    Returns:
        SHA-256, hexadecimal; the same wherever the folder lies.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> before = fingerprint(folder)
        >>> _ = (folder / "labels.json").write_text("{}")
        >>> fingerprint(folder) == before
        False
    """
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        name = file.relative_to(path).as_posix() if file != path else file.name
        digest.update(f"{name}\0{file.stat().st_size}\0".encode(errors="surrogateescape"))
        if file.suffix.lower() in _READ or file == path:
            digest.update(file.read_bytes())
    return digest.hexdigest()
