"""Explain broken image files: each is to be explained, or refused in one line, in little time and memory.

    python benchmarks/fuzz.py [--files 10000] [--seed 0] [--keep folder]

A scene is written in every format that Pillow can write, in several modes and sizes, and by hand in some that it can
only read; then files are mutated: bytes changed, cut, repeated, moved, joined with another file's, numbers made
extreme. A worker of its own reads and explains each with the bundled network. A failure is an exception other than
ImageError, a message of more than one line, anything printed, no answer in ten seconds, a worker that died, or more
than 1 GiB of memory above what the worker holds for a sound file. Failures are written to the folder. Prints what
became of the files of each format; the exit status is 1 if any failed.
"""

import argparse
import contextlib
import io
import multiprocessing
import random
import re
import struct
import sys
import tempfile
import time
from collections import Counter, defaultdict
from multiprocessing.connection import Connection
from pathlib import Path

from PIL import Image

import tsgb
from tsgb import images, scenes
from tsgb.models import Network

PATIENCE = 10.0  # seconds
BOUND = 2**30  # bytes
MODES = ("RGB", "L", "1", "P", "RGBA", "I;16", "CMYK", "F")
EXTREMES = (0, 1, 127, 128, 255, 2**15 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1)


def main() -> None:
    """Mutate, explain, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("tsgb-out/fuzz"), help="where failures are written")
    args = parser.parse_args()
    sound, chance = seeds(), random.Random(args.seed)
    kinds = sorted({kind for kind, _ in sound})
    became: dict[str, Counter[str]] = defaultdict(Counter)
    worker, slowest, most = Worker(), 0.0, 0
    for number in range(args.files):
        kind, data = chance.choice([seed for seed in sound if seed[0] == kinds[number % len(kinds)]])
        mutant = mutated(data, chance.choice(sound)[1], chance)
        fate, seconds, memory = worker.explain(mutant)
        slowest, most = max(slowest, seconds), max(most, memory)
        if memory > BOUND:
            fate = f"failed: {memory / 2**20:.0f} MiB"
        became[kind][fate.split(":")[0]] += 1
        if fate.startswith("failed"):
            args.keep.mkdir(parents=True, exist_ok=True)
            path = args.keep / f"{number}.{kind.lower()}"
            path.write_bytes(mutant)
            print(f"{path}: {fate}", flush=True)
    worker.stop()
    print("| format | explained | refused | failed |\n|---|---:|---:|---:|")
    for kind in kinds:
        print(f"| {kind} | {became[kind]['explained']} | {became[kind]['refused']} | {became[kind]['failed']} |")
    total = sum(became.values(), Counter())
    fates = ", ".join(f"{total[fate]} {fate}" for fate in ("explained", "refused", "failed"))
    print(f"\n{args.files} files of {len(kinds)} formats: {fates}.")
    print(f"Slowest {slowest:.1f} s, most memory {most / 2**20:.0f} MiB.")
    sys.exit(total["failed"] > 0)


def seeds() -> list[tuple[str, bytes]]:
    """Sound files: (format, bytes)."""
    Image.init()
    scene = Image.fromarray(scenes.render(1).image)
    found = []
    for kind in sorted(Image.SAVE):
        if kind not in Image.OPEN:
            continue
        for mode in MODES:
            for size in ((64, 48), (128, 128)):
                file = io.BytesIO()
                with contextlib.suppress(Exception):  # not every format holds every mode
                    scene.resize(size).convert(mode).save(file, kind)
                    found.append((kind, file.getvalue()))
    by_kind = dict(found)
    rows = scene.resize((64, 48)).tobytes()
    found.append(("SUN", struct.pack(">8I", 0x59A66A95, 64, 48, 24, len(rows), 1, 0, 0) + rows))
    colours = b'"4 4 2 1",\n"a c #ff0000",\n"b c #00ff00",\n'
    found.append(("XPM", b"/* XPM */\nstatic char *a[] = {\n" + colours + b'"abab",\n' * 4 + b"};\n"))
    found.append(("PSD", struct.pack(">4sH6xHIIHHIIIH", b"8BPS", 1, 3, 48, 64, 8, 3, 0, 0, 0, 0) + rows))
    if "ICO" in by_kind:
        found.append(("CUR", b"\0\0\2\0" + by_kind["ICO"][4:]))
    if "PCX" in by_kind:
        found.append(("DCX", struct.pack("<3I", 0x3ADE68B1, 12, 0) + by_kind["PCX"]))
    return found


def mutated(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """A file with one to eight things wrong."""
    mutant = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        length = max(1, len(mutant))
        # Most of what decides lies at the start.
        place = min(length - 1, int(chance.expovariate(1 / 40)) if chance.random() < 0.6 else chance.randrange(length))
        what = chance.randrange(7)
        if what == 0:
            mutant[place : place + 1] = bytes([chance.randrange(256)])
        elif what == 1:
            width = chance.choice((1, 2, 4))
            number = chance.choice(EXTREMES) % 256**width
            mutant[place : place + width] = number.to_bytes(width, chance.choice(("little", "big")))
        elif what == 2:
            del mutant[place:]
        elif what == 3:
            del mutant[place : place + chance.randrange(1, 64)]
        elif what == 4:
            mutant[place:place] = mutant[place : place + chance.randrange(1, 256)] * chance.randrange(1, 4)
        elif what == 5:
            mutant[place:place] = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 32)))
        else:
            mutant[place:] = other[chance.randrange(len(other)) :]
    return bytes(mutant)


class Worker:
    """A process that explains files; another takes its place when it hangs or dies."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._path = Path(self._folder.name) / "image"
        self._start()

    def explain(self, data: bytes) -> tuple[str, float, int]:
        """What became of a file, in how many seconds, with how many bytes above those of a sound file."""
        self._path.write_bytes(data)
        start = time.perf_counter()
        self._line.send(str(self._path))
        try:
            if self._line.poll(PATIENCE):
                fate, memory = self._line.recv()
                return fate, time.perf_counter() - start, memory
            fate = "failed: no answer"
        except EOFError:
            fate = "failed: died"
        self._process.kill()
        self._start()
        return fate, time.perf_counter() - start, 0

    def stop(self) -> None:
        """Let the process go."""
        self._process.kill()
        self._folder.cleanup()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._line, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._line.recv()


def _serve(line: Connection) -> None:
    network = tsgb.load("bundled")
    sound = network.preprocessing.tensor(Image.fromarray(scenes.render(1).image))[None]
    for _ in range(3):
        tsgb.explain(network.model, sound, "top1")
    line.send("ready")
    usual = _resident("VmRSS")
    while True:
        path = line.recv()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            fate = _fate(network, path)
        if said.getvalue():
            fate = f"failed: printed {said.getvalue()[:80]!r}"
        line.send((fate, max(0, _resident("VmHWM") - usual)))


def _fate(network: Network, path: str) -> str:
    try:
        image = network.preprocessing.tensor(images.read(path))[None]
        finite = bool(tsgb.explain(network.model, image, "top1").maps.isfinite().all())
        return "explained" if finite else "failed: not finite"
    except images.ImageError as error:
        return "refused" if "\n" not in str(error) else f"failed: several lines {str(error)[:80]!r}"
    except BaseException as error:
        return f"failed: {type(error).__name__} {str(error)[:80]!r}"


def _resident(name: str) -> int:
    status = Path("/proc/self/status")
    found = re.search(rf"^{name}:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    return 1024 * int(found[1]) if found else 0


if __name__ == "__main__":
    main()
