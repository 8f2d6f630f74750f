"""Freeze the maps of `frozen_networks` as the tsgb that is imported makes them, for tests/test_frozen.py.

    python tests/golden/freeze.py                  # PAPER, PIXELS, DEFAULT, FUSED0: of the package up to 0.1
    python tests/golden/freeze.py --tables FUSED   # these alone; the others stay as they are
    python tests/golden/freeze.py --tables "" --float32 ../shared

FUSED0 is `DEFAULT` of that package with neither the class's ground nor the peak in the map. ``--float32`` writes how
far the float32 maps of trained networks lie from those of float64, for photographs that are no part of the project.
"""

import argparse
import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

import tsgb

HERE = Path(__file__).resolve().parent


@contextmanager
def table(name):
    """The table of that name."""
    if name != "FUSED0":
        yield getattr(tsgb.rules, name)
        return
    from tsgb.rules import maps

    before = maps._GROUND, maps._PEAK
    maps._GROUND = maps._PEAK = 0
    try:
        yield tsgb.rules.DEFAULT
    finally:
        maps._GROUND, maps._PEAK = before


def freeze(tables):
    """Write the archive: for each network and table a row of one class and a row of three, see `frozen_networks`."""
    from frozen_networks import NAMES, build, kept

    path = HERE / "frozen.npz"
    archive = dict(np.load(path)) if path.exists() else {}
    for network in NAMES:
        model, inputs, *targets = build(network)
        for name in tables:
            with table(name) as rules:
                maps = [tsgb.explain(model, inputs, target, rules=rules).maps for target in targets]
            archive[f"{network}/{name}"] = np.stack([kept(both) for both in maps])
        print(network, flush=True)
    np.savez(path, **archive)


def freeze_float32(shared):
    """Write, for each trained network and table, how far off float32 is for each photograph."""
    from frozen_photographs import NETWORKS, PREPROCESSING, TABLES, off, photographs, trained

    record = {"preprocessing": PREPROCESSING, "photographs": [name for name, _ in photographs(shared)], "off": {}}
    for network in NETWORKS:
        model = trained(network, shared)
        for name in TABLES:
            each = [off(model, network, image, getattr(tsgb.rules, name)) for _, image in photographs(shared)]
            summary = {"max": max(each), "median": float(np.median(each)), "each": each}
            record["off"][f"{network}/{name}"] = summary
            print(network, name, summary, flush=True)
    (HERE / "frozen_float32.json").write_text(json.dumps(record, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", default="PAPER,PIXELS,DEFAULT,FUSED0", help="separated by commas")
    parser.add_argument("--float32", type=Path, help="the folder of weights and photographs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"of {tsgb.__file__}")
    if args.tables:
        freeze(args.tables.split(","))
    if args.float32:
        freeze_float32(args.float32)


if __name__ == "__main__":
    main()
