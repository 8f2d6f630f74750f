"""Explain for long, and from many threads: memory stays flat, maps stay bit for bit the same.

    python benchmarks/soak.py [--explanations 10000] [--threads 16] [--each 200]

First one explanation after another with the bundled networks, of other sizes, numbers of images and targets in turn,
now and then one that is refused; what is resident is measured every five hundred, from the second thousand on. Then
many threads explain images of their own with one network at once, and every map is compared with the one from before.
The exit status is 1 if memory grew by more than 16 MiB or a map differed.
"""

import argparse
import ctypes
import gc
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import tsgb

GROWTH = 16 * 2**20
EVERY, WARM = 500, 1000


def main() -> None:
    """Soak, thread, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--explanations", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--each", type=int, default=200)
    args = parser.parse_args()
    measured = list(soaked(args.explanations))
    growth = max(measured) - measured[0]
    print(f"{args.explanations} explanations: resident {measured[0] / 2**20:.0f} MiB after {WARM}, ", end="")
    print(f"at most {growth / 2**20:+.1f} MiB after that")
    different = threaded(args.threads, args.each)
    print(f"{args.threads} threads, {args.each} explanations each: {different} maps differ from those made one by one")
    sys.exit(growth > GROWTH or different > 0)


def soaked(count: int) -> list[int]:
    """Bytes resident, every so often."""
    networks = [tsgb.load(name).model for name in ("bundled", "bundled-vgg")]
    measured = []
    for number in range(1, count + 1):
        model = networks[number % 2]
        side = 128 if number % 2 else (64, 96, 128, 160)[number // 2 % 4]
        images = torch.rand(1 + number % 3, 3, side, side)
        target = (None, 3, "top3", lambda logits: logits[:, 0] - logits[:, 1])[number % 4]
        if number % 7 == 0:
            target = 99  # a class that it does not have
        try:
            tsgb.explain(model, images, target)
        except tsgb.TargetError:
            if number % 7:
                raise
        if number >= WARM and number % EVERY == 0:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            found = re.search(r"^VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
            assert found is not None
            measured.append(1024 * int(found[1]))
            print(f"{number}: {measured[-1] / 2**20:.0f} MiB", flush=True)
    return measured


def threaded(threads: int, each: int) -> int:
    """How many maps differ from those made one by one."""
    model = tsgb.load("bundled").model
    images = [torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(seed)) for seed in range(threads)]
    alone = [tsgb.explain(model, image, seed % 10).maps for seed, image in enumerate(images)]

    def explained(seed: int) -> int:
        found = (tsgb.explain(model, images[seed], seed % 10).maps for _ in range(each))
        return sum(not torch.equal(maps, alone[seed]) for maps in found)

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(explained, range(threads)))


if __name__ == "__main__":
    main()
