"""Explain a rendered scene with tsgb: where the network that comes with the package sees each of two objects.

    python examples/explain.py [folder]

It writes one overlay for each object. `examples/by_hand.py` has the method behind it in one file.
"""

import sys
from pathlib import Path

from PIL import Image

import tsgb

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "tsgb-out") / "explain"
network = tsgb.load("bundled")  # or "resnet50", "timm:convnext_tiny", "nets.py:my_network"
photo = Image.fromarray(tsgb.scenes.render(5, [1, 3]).image)  # or Image.open("photo.jpg").convert("RGB")
images = network.preprocessing.tensor(photo)[None]  # (1, 3, 128, 128)
explanation = tsgb.explain(network.model, images, target="top2")  # explanation.maps is (1, 2, 128, 128)
folder.mkdir(parents=True, exist_ok=True)
for k, index in enumerate(explanation.targets[0].tolist()):
    path = folder / f"{tsgb.scenes.CLASSES[index]}.png"
    explanation.overlay(photo, target=k, preprocessing=network.preprocessing).save(path)
    print(path)
