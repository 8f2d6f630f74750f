"""Explain a network of three dimensions: where in a scan the lesion is.

    python examples/volume.py [folder]

A small Conv3d network is trained, in seconds, to tell volumes with a bright cube from those with a bright plate alone;
its map is laid over the slices of a volume that it did not see. Any network over (N, C, D, H, W) is explained the same
way; of a video D is time.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import tsgb

SIZE = (16, 24, 24)


def scan(place: tuple[int, int, int] | None) -> Tensor:
    """Noise and a plate, and a cube of 4 voxels at a place."""
    volume = 0.3 * torch.rand(1, *SIZE)
    volume[0, 4:12, :, 10:12] += 0.25
    if place is not None:
        z, y, x = place
        volume[0, z : z + 4, y : y + 4, x : x + 4] += 0.6
    return volume


def somewhere() -> tuple[int, int, int]:
    """A place for the cube."""
    z, y, x = (int(torch.randint(0, n - 4, ())) for n in SIZE)
    return z, y, x


def block(inputs: int, outputs: int) -> list[nn.Module]:
    """Convolution, batch norm and ReLU."""
    return [nn.Conv3d(inputs, outputs, 3, padding=1), nn.BatchNorm3d(outputs), nn.ReLU()]


def main() -> None:
    """Train, explain, draw."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "tsgb-out")
    torch.manual_seed(0)
    layers = [*block(1, 8), nn.MaxPool3d(2), *block(8, 16), nn.AdaptiveMaxPool3d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(16, 2))
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        ill = torch.randint(0, 2, (16,))
        batch = torch.stack([scan(somewhere() if there else None) for there in ill])
        loss = functional.cross_entropy(model(batch), ill)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()

    explanation = tsgb.explain(model, scan((5, 17, 3))[None], target=1)  # maps (1, 1, 16, 24, 24)
    for path in explanation.save(folder / "volume"):
        print(path)
    z, y, x = torch.unravel_index(explanation.maps[0, 0].argmax(), SIZE)
    print(f"strongest evidence at slice {z}, row {y}, column {x}; the cube spans 5-8, 17-20, 3-6")


if __name__ == "__main__":
    main()
