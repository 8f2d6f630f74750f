"""Which threshold suits `Explanation.boxes`: the overlap of single boxes with the true ones, by threshold.

    python benchmarks/thresholds.py [--model bundled] [--weights FILE] [--data PATH] [--images 0:100] [--rules pixels]

For each class that is annotated in an image, the box of the largest piece of its map above each threshold, and its
greatest intersection over union (IoU) with a true box of the class; the mean over all, and in how many it is a half or
more. What it finds is of images and objects like these: large objects want a low threshold, small ones a high one.
"""

import argparse
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

import tsgb
from tsgb import regions
from tsgb.bench.samples import Classifier, prepare_sample

THRESHOLDS = ("mean", 0.2, 0.3, 0.4, 0.5)


def main() -> None:
    """Explain, draw boxes, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--weights")
    parser.add_argument("--data")
    parser.add_argument("--mean", nargs="+", type=float)
    parser.add_argument("--std", nargs="+", type=float)
    parser.add_argument("--images", default="0:100", help="as Python slices: start:stop:step")
    parser.add_argument("--rules", choices=tuple(tsgb.rules.TABLES), default="fused")
    args = parser.parse_args()
    network = tsgb.load(args.model, args.weights, mean=args.mean, std=args.std)
    taken = slice(*(int(part) if part else None for part in args.images.split(":")))
    rows = np.array(list(overlaps(network, tsgb.data.open_dataset(args.data), taken, tsgb.rules.TABLES[args.rules])))
    print(f"{len(rows)} classes in images; threshold: mean IoU, % of IoU 0.5 and more")
    for threshold, column in zip(THRESHOLDS, rows.T, strict=True):
        print(f"{threshold}: {column.mean():.2f}, {100 * (column >= 0.5).mean():.0f}")


def overlaps(
    network: tsgb.models.Network, dataset: tsgb.data.Dataset, taken: slice, table: tsgb.rules.Table
) -> Iterator[list[float]]:
    """The IoU at each threshold, of one class in one image after another."""
    model = Classifier(network.model)
    for index in range(len(dataset.samples))[taken]:
        image = dataset.samples[index].read()
        tensor = network.preprocessing.tensor(image)
        with torch.no_grad():
            logits = model(tensor[None])[0]
        cases = prepare_sample(dataset.samples[index], index, image, tensor, logits, dataset, network).cases
        cases = tuple(case for case in cases if len(case.boxes))
        if cases:
            found = tsgb.explain(model, tensor[None], [[case.target for case in cases]], rules=table)
            for case, drawn in zip(cases, found.maps[0].numpy(), strict=True):
                yield [iou(regions.boxes(drawn, threshold), case.boxes) for threshold in THRESHOLDS]


def iou(drawn: npt.NDArray[np.float64], true: npt.NDArray[np.float64]) -> float:
    """The greatest intersection over union of a box, (1, 4) or none, (0, 4), with one of (n, 4)."""
    if not len(drawn):
        return 0.0
    width, height = np.clip(np.minimum(drawn[:, 2:], true[:, 2:]) - np.maximum(drawn[:, :2], true[:, :2]), 0, None).T
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (drawn, true)]
    return float((width * height / (areas[0] + areas[1] - width * height)).max())


if __name__ == "__main__":
    main()
