"""Results and a gallery as the bench hands them on, drawn from a seed, with everything that may be in them."""

import io
import random

from PIL import Image, ImageDraw

METHODS = {
    "tsgb": "TSGB", "tsgb-paper": "TSGB, as published", "gradcam": "Grad-CAM", "layercam": "LayerCAM",
    "gradient": "Gradient", "inputxgradient": "Input x gradient", "smoothgrad": "SmoothGrad",
    "integrated-gradients": "Integrated gradients", "guided": "Guided backprop", "deconvnet": "Deconvnet",
    "guided-gradcam": "Guided Grad-CAM", "ebp": "Excitation backprop", "cebp": "Contrastive excitation backprop",
    "deeplift": "DeepLIFT", "lrp": "LRP", "occlusion": "Occlusion", "rise": "RISE", "center": "Center",
    "random": "Random",
}  # fmt: skip
METRICS = {
    "mask_ap": ("Mask AP", "%", "higher", "order"), "box_ap": ("Box AP", "%", "higher", "order"),
    "grid_ap": ("Grid AP 2 x 2", "%", "higher", "order"), "pointing": ("Pointing", "%", "higher", "order"),
    "pointing_class": ("Pointing, classes", "%", "higher", "order"),
    "pointing_15": ("Pointing +15", "%", "higher", "order"),
    "pointing_difficult": ("Pointing, difficult", "%", "higher", "order"),
    "energy": ("Energy", "%", "higher", "share"), "grid": ("Grid share 2 x 2", "%", "higher", "share"),
    "box_accuracy": ("Box accuracy", "%", "higher", "boxes"),
    "max_box_accuracy": ("MaxBoxAcc", "%", "higher", "boxes"),
    "insertion": ("Insertion", "", "higher", "perturbation"), "deletion": ("Deletion", "", "lower", "perturbation"),
    "sensitivity": ("Class sensitivity", "", "lower", "sanity"),
    "cascade": ("Cascade", "", "neither", "sanity"), "speed": ("Time", "", "lower", "cost"),
    "memory": ("Memory", "", "lower", "cost"),
}  # fmt: skip


def results(seed=0):
    """19 methods, 16 metrics: one method fails, one is left out, as is one metric more; one method fails in part, some
    figures are missing, one has no interval."""
    chance = random.Random(seed)
    rows, differences = [], []
    for metric, (_, unit, _, kind) in METRICS.items():
        if metric == "sensitivity":
            continue
        controls = ["gradcam^2", "gradcam^3", "tsgb^0.5", "tsgb^2"] if kind == "share" else []
        for place, method in enumerate([*METHODS, *controls]):
            if method in ("deeplift", "lrp"):
                continue
            value = chance.uniform(30, 92) if unit else chance.uniform(0.1, 0.7)
            value = 1.15 * 1.6**place if metric == "speed" else value
            wide = value * chance.uniform(0.03, 0.12)
            row = {"method": method, "metric": metric, "value": value, "low": value - wide, "high": value + wide}
            n = 12 if metric == "grid" else 58 if metric == "pointing_difficult" else 101
            rows.append({**row, "n": n - 9 if method == "rise" else n})
            if method == "center" and metric == "cascade":
                rows[-1] |= {"value": None, "low": None, "high": None}
            if method == "random" and metric == "memory":
                rows[-1] |= {"low": float("nan"), "high": None}
            if method != "tsgb" and metric not in ("speed", "memory"):
                middle, wide = chance.gauss(0, 0.08 * value), chance.uniform(0.03, 0.12) * value
                ends = {"value": middle, "low": middle - wide, "high": middle + wide, "n": n}
                differences.append({"method": method, "metric": metric, **ends})
    failures = [
        {"method": "deeplift", "reason": "RuntimeError: a module was used more than once in the forward pass, which "
         "this method cannot follow", "count": 101, "images": ["000000000139.jpg", "000000000285.jpg"]},
        {"method": "rise", "reason": "out of memory", "count": 13, "images": ["a_long_name_of_a_picture.jpg"]},
    ]  # fmt: skip
    return {
        "protocol": {
            "model": "mobilenet_v2", "weights": "mobilenet_v2-7ebf99e0.pth", "weights_sha256": "7ebf99e0" * 8,
            "data": "imagenet_val400", "data_sha256": "0123456789abcdef" * 4, "layout": "coco", "seed": 0,
            "batch_size": 8,
            "preprocessing": {"size": [224, 224], "mean": [0.485, 0.456, 0.406], "resize": "squash"},
            "images": 100, "cases": 101, "grids": {"grid": 12, "grid_3x3": 4}, "confidence": 0.9,
            "distant": 3, "asked": list(METRICS),
            "versions": {"tsgb": "0.1.0", "torch": "2.13.0", "python": "3.11.9"},
            "methods": {
                name: {"title": title, "source": f"tsgb.methods, {title}, with every parameter that it takes"}
                for name, title in METHODS.items()
            },
            "metrics": {
                name: {"title": title, "text": f"how {title} is taken, with every parameter, mean over image and class",
                       "unit": unit, "better": better, "kind": kind}
                for name, (title, unit, better, kind) in METRICS.items()
            },
        },
        "rows": rows, "differences": differences, "failures": failures,
        "problems": ["images/broken.jpg: not a picture", "images/<img src=x onerror=alert(1)>.jpg: not a picture"],
        "left_out": {"lrp": "needs zennit: pip install 'tsgb[zennit]'", "sensitivity": "no second class"},
    }  # fmt: skip


def jpeg(seed=0, size=(224, 224)):
    """A picture of a few discs, as a JPEG file's bytes."""
    chance = random.Random(seed)
    picture = Image.new("RGB", size, tuple(chance.randrange(60, 200) for _ in range(3)))
    draw = ImageDraw.Draw(picture)
    for _ in range(6):
        x, y, r = chance.randrange(size[0]), chance.randrange(size[1]), chance.randrange(8, 70)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(chance.randrange(256) for _ in range(3)))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return file.getvalue()


def gallery(images=12, methods=tuple(METHODS)):
    """Pictures with a map of each method, worst first."""
    names = ["<img src=x onerror=alert(1)>.jpg", *(f"ILSVRC2012_val_{k:08}.jpg" for k in range(1, images))]
    return [
        {
            "image": names[k], "target": f"{200 + k} bull mastiff", "score": 0.12 + 0.05 * k, "picture": jpeg(k),
            "cells": [
                {"method": method, "overlay": jpeg(100 * k + place),
                 "note": "miss, AP 0.31" if place % 3 else "hit, AP 0.62"}
                for place, method in enumerate(methods) if method not in ("deeplift", "lrp")
            ],
        }
        for k in range(images)
    ]  # fmt: skip
