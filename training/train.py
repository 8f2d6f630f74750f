"""Train a bundled network on rendered scenes, measure it on others, and write its weights with their record.

    python training/train.py bundled --out src/tsgb/weights
    python training/train.py bundled-vgg --out src/tsgb/weights

They take seven and nine minutes on two quiet cores that multiply bfloat16 in hardware. The number of threads changes
the last bits of the sums, and with them the weights. The weights are stored as float16, and what is measured is what is
stored.
"""

import argparse
import json
import os
import time
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from tsgb import networks, scenes

MAKERS = {"bundled": networks.Bundled, "bundled-vgg": networks.BundledVGG}
SEED = 0
EPOCHS = {"bundled": 5, "bundled-vgg": 5}
BATCH = 32
RATES = {"bundled": 3e-3, "bundled-vgg": 2e-3}
DECAY = 0.02

# No seed below is among networks.TRAINING_SEEDS.
SINGLE_SEEDS = range(0, 2000)
PAIR_SEEDS = range(2000, 4000)
LARGE = 384

Images = npt.NDArray[np.uint8]


def main() -> None:
    """Train, measure and write the network that the command line names."""
    parser = argparse.ArgumentParser(description="Train a bundled network and write its weights and their record.")
    parser.add_argument("network", choices=sorted(MAKERS))
    parser.add_argument("--out", type=Path, required=True, help="the folder for the weights and their record")
    arguments = parser.parse_args()
    start = time.monotonic()
    network = fit(arguments.network)
    minutes = (time.monotonic() - start) / 60
    stored = {name: half(value) for name, value in network.state_dict().items()}
    network.load_state_dict(stored)
    record = {
        "network": arguments.network,
        "classes": list(scenes.CLASSES),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "stored_as": "float16",
        "preprocessing": {"size": networks.INPUT["size"], "scale": 1 / 255}
        | {key: list(networks.INPUT[key]) for key in ("mean", "std")},
        "training": {
            "command": f"python training/train.py {arguments.network} --out src/tsgb/weights",
            "seed": SEED,
            "scenes": len(networks.TRAINING_SEEDS),
            "scene_seeds": span(networks.TRAINING_SEEDS),
            "objects": "1 to 4 a scene, soft targets 1/n",
            "epochs": EPOCHS[arguments.network],
            "minutes": round(minutes, 1),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "held_out": [
            measure(network, count, seeds, size)
            for size in (networks.INPUT["size"], LARGE)
            for count, seeds in ((1, SINGLE_SEEDS), (2, PAIR_SEEDS))
        ],
    }
    print(json.dumps(record["held_out"], indent=2))
    write(arguments.out / f"{arguments.network}.safetensors", safetensors.torch.save(stored))
    write(arguments.out / f"{arguments.network}.json", (json.dumps(record, indent=2) + "\n").encode())


def fit(name: str) -> nn.Module:
    """Train the network of this name, with AdamW in one cycle, and return it in eval mode."""
    torch.manual_seed(SEED)
    images, targets = render(networks.TRAINING_SEEDS, None, networks.INPUT["size"])
    present = torch.from_numpy(targets)
    goals = present / present.sum(dim=1, keepdim=True)
    network = MAKERS[name]().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    epochs, steps = EPOCHS[name], len(images) // BATCH
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATES[name], weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATES[name], total_steps=epochs * steps, pct_start=0.15)
    for epoch in range(epochs):
        start, total = time.monotonic(), 0.0
        for batch in torch.randperm(len(images))[: steps * BATCH].view(steps, BATCH):
            x = augment(networks.inputs(images[batch.numpy()])).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                scores = network(x)
            loss = nn.functional.cross_entropy(scores.float(), goals[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}: loss {total / steps:.4f}, {time.monotonic() - start:.0f} s", flush=True)
    return network.eval()  # type: ignore[no-any-return]


def augment(x: Tensor) -> Tensor:
    """Mirror, move, recolour and blur a batch of images at random, so that neither place nor colour tells."""
    n = len(x)
    x = torch.where(torch.rand(n, 1, 1, 1) < 0.5, x.flip(3), x)
    x = x.roll((int(torch.randint(-12, 13, ())), int(torch.randint(-12, 13, ()))), dims=(2, 3))
    x = x[:, torch.randperm(3)]
    x = x * torch.empty(n, 1, 1, 1).uniform_(0.7, 1.2) + torch.empty(n, 3, 1, 1).uniform_(-0.15, 0.15)
    blurred = nn.functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    return x + (blurred - x) * torch.empty(n, 1, 1, 1).uniform_(-0.2, 0.8)


def render(seeds: range, count: int | None, size: int) -> tuple[Images, npt.NDArray[np.float32]]:
    """Render the scenes of some seeds at a size and bring them to the networks' size.

    Returns the images, (N, 128, 128, 3) uint8, and which classes each shows, (N, 10) float32 of 0 and 1.
    """
    side = networks.INPUT["size"]
    images = np.empty((len(seeds), side, side, 3), dtype=np.uint8)
    targets = np.zeros((len(seeds), len(scenes.CLASSES)), dtype=np.float32)
    with Pool() as pool:
        drawn = pool.imap(partial(draw, count=count, size=size), seeds, chunksize=50)
        for row, (image, classes) in enumerate(drawn):
            images[row], targets[row, list(classes)] = image, 1.0
    return images, targets


def draw(seed: int, count: int | None, size: int) -> tuple[Images, tuple[int, ...]]:
    """Render one scene, squash it to the networks' size, and return it with its classes."""
    scene, side = scenes.render(seed, count=count, size=size), networks.INPUT["size"]
    if size == side:
        return scene.image, scene.classes
    small = Image.fromarray(scene.image).resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(small), scene.classes


@torch.no_grad()
def measure(network: nn.Module, count: int, seeds: range, size: int) -> dict[str, Any]:
    """Measure the share of scenes of `count` objects whose classes are the `count` highest scores."""
    images, targets = render(seeds, count, size)
    batches = np.array_split(np.arange(len(images)), len(images) // BATCH)
    scores = torch.cat([network(networks.inputs(images[batch])) for batch in batches])
    right = torch.from_numpy(targets).gather(1, scores.topk(count).indices).all(dim=1)
    return {
        "objects": count,
        "rendered_at": size,
        "scenes": len(seeds),
        "scene_seeds": span(seeds),
        f"all_in_top_{count}": round(right.double().mean().item(), 4),
    }


def half(value: Tensor) -> Tensor:
    """Round floats to float16 and leave counts alone."""
    return value.to(torch.float16).contiguous() if value.is_floating_point() else value


def span(seeds: range) -> str:
    """Put a range of seeds in words."""
    return f"{seeds.start} to {seeds.stop - 1}"


def write(path: Path, content: bytes) -> None:
    """Write a file so that whoever reads it meanwhile sees the old one or the new one, whole."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)


if __name__ == "__main__":
    main()
