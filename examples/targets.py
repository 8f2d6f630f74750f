"""Ask more than "why this class": any number that a network computes of an image can be the target.

    python examples/targets.py [folder]

A target is a class, or a function from the model's output to one number for each image. On a rendered scene with a
heart and a flower, with the network that comes with the package: why this class and not that; a class within a box of
a dense output, as of a segmentation; the score of a detection; a regressed value; the similarity to another image.
"""

import sys
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

import tsgb
from tsgb import scenes

FLOWER, HEART = (scenes.CLASSES.index(name) for name in ("flower", "heart"))


class Dense(nn.Module):
    """The classifier's head at every position: (N, classes, 8, 8), as a segmentation network returns."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks = classifier.stem, classifier.blocks
        weight, bias = classifier.head.weight[:, :, None, None], classifier.head.bias
        self.score = nn.Conv2d(weight.shape[1], len(weight), 1)
        self.score.weight, self.score.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Score every position, in a dict as torchvision's segmentation networks do."""
        return {"out": self.score(self.blocks(self.stem(x)))}


class Detector(nn.Module):
    """Boxes and scores for each position, as a one-stage detector returns them before the choice of the best."""

    def __init__(self, dense: Dense) -> None:
        super().__init__()
        self.dense, self.box = dense, nn.Conv2d(96, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (N, positions, 4) and scores (N, positions, classes)."""
        features = self.dense.blocks(self.dense.stem(x))
        return self.box(features).flatten(2).mT, self.dense.score(features).flatten(2).mT


class Regressor(nn.Module):
    """One number for each image: how much more it looks like the first class than like the others."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.features = nn.Sequential(classifier.stem, classifier.blocks, classifier.pool, classifier.flatten)
        others = classifier.head.weight.mean(0)
        self.value = nn.Linear(len(others), 1)
        self.value.weight = nn.Parameter((classifier.head.weight[FLOWER] - others)[None])

    def forward(self, x: Tensor) -> Tensor:
        """Values (N, 1)."""
        return self.value(self.features(x))


def main() -> None:
    """Explain each target and say how much of the evidence lies on the flower and on the heart."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "tsgb-out") / "targets"
    loaded = tsgb.load("bundled")
    model: nn.Module = loaded.model
    scene = scenes.render(5, [FLOWER, HEART])
    original = Image.fromarray(scene.image)
    image = loaded.preprocessing.tensor(original)[None]
    masks = {
        scenes.CLASSES[index]: torch.from_numpy(mask) for index, mask in zip(scene.classes, scene.masks, strict=True)
    }
    dense = Dense(model).eval()

    # The position where the detector is surest of a flower.
    with torch.no_grad():
        best = int(Detector(dense)(image)[1].softmax(2)[0, :, FLOWER].argmax())
    # Which row and column of the dense output the heart lies in.
    rows, columns = (torch.where(masks["heart"].any(axis))[0] // 16 for axis in (1, 0))
    box = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
    # What another flower looks like to the network.
    features = nn.Sequential(model.stem, model.blocks, model.pool, model.flatten).eval()
    with torch.no_grad():
        other = features(loaded.preprocessing.tensor(Image.fromarray(scenes.render(77, [FLOWER]).image))[None])

    asked = {
        "flower": (model, FLOWER),
        "flower and not heart": (model, lambda logits: logits[:, FLOWER] - logits[:, HEART]),
        "heart within its box": (dense, lambda output: output["out"][:, HEART][:, *box].mean((1, 2))),
        "flower, as detected": (Detector(dense).eval(), lambda output: output[1][:, best, FLOWER]),
        "flower, as a number": (Regressor(model).eval(), lambda values: values[:, 0]),
        "like another flower": (features, lambda found: functional.cosine_similarity(found, other)),
    }
    for name, (network, target) in asked.items():
        explanation = tsgb.explain(network, image, target)
        positive = explanation.maps[0, 0].clamp(min=0)
        shares = {thing: float(positive[mask].sum() / positive.sum()) for thing, mask in masks.items()}
        print(f"{name:22} {', '.join(f'{share:.0%} on the {thing}' for thing, share in shares.items())}")
        folder.mkdir(parents=True, exist_ok=True)
        explanation.overlay(original).save(folder / f"{name.replace(' ', '-').replace(',', '')}.png")
    print(folder)


if __name__ == "__main__":
    main()
