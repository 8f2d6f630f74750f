"""How far the map of a trained network in float32 lies from its own in float64, for a few photographs."""

import copy
import importlib.util
import json

import numpy as np
import torch
from PIL import Image

import tsgb

NETWORKS = {
    "mobilenet_v2": "mobilenet_v2_qat_dequant.pth",
    "squeezenet1_1": "squeezenet1_1_mxnet.pth",
    "tiny_darknet": "tiny_darknet_imagenet.pth",
}
TABLES = ("PAPER", "PIXELS", "DEFAULT")
PREPROCESSING = (
    "RGB, the middle 224 x 224 pixels as they are (short sides are 256), / 255; for mobilenet_v2 and squeezenet1_1 "
    "also less (.485, .456, .406), / (.229, .224, .225); rounded to float32; one photograph at a time; the class that "
    "float64 predicts; off = norm(map32 - map64) / norm(map64)"
)


def photographs(shared):
    """Each 50th of imagenet_val400 by its name: names, and images (1, 3, 224, 224) in 0..1, float64."""
    folder = shared / "data" / "imagenet_val400"
    names = sorted(image["file_name"] for image in json.loads((folder / "annotations.json").read_text())["images"])[
        ::50
    ]
    found = []
    for name in names:
        with Image.open(folder / "images" / name) as picture:
            colours = np.array(picture.convert("RGB"))
        top, left = ((side - 224) // 2 for side in colours.shape[:2])
        seen = colours[top : top + 224, left : left + 224]
        found.append((name, torch.from_numpy(seen).permute(2, 0, 1)[None].double() / 255))
    return found


def trained(network, shared):
    """The network with its weights, in float32 and evaluation mode."""
    path = shared / "weights" / NETWORKS[network]
    if network == "tiny_darknet":
        spec = importlib.util.spec_from_file_location("shared_nets", shared / "tools" / "nets.py")
        nets = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(nets)
        return nets.tiny_darknet(path)
    from tsgb.vision import import_torchvision

    model = getattr(import_torchvision().models, network)(weights=None)
    model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    return model.eval()


def off(model, network, image, rules):
    """How far the map in float32 lies from that in float64, over the norm of the latter."""
    if network != "tiny_darknet":
        mean, std = torch.tensor([(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)], dtype=torch.float64)[:, :, None, None]
        image = (image - mean) / std
    image, double = image.float(), copy.deepcopy(model).double()
    fine = tsgb.explain(double, image.double(), None, rules=rules)
    coarse = tsgb.explain(model, image, fine.targets, rules=rules)
    return float((coarse.maps.double() - fine.maps).norm() / fine.maps.norm())
