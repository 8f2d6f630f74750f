"""Explain a network of one dimension: which heartbeat of a recording is the odd one.

    python examples/series.py [folder]

A small Conv1d network is trained, in seconds, to tell recordings with one inverted beat from those without; its map is
drawn under a recording that it did not see. Any network over (N, C, L) is explained the same way.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import tsgb

BEATS, RATE = 6, 100


def recording(odd: int | None) -> Tensor:
    """Two leads of six seconds, with the beat of that number inverted."""
    time = torch.arange(BEATS * RATE) / RATE
    lead = torch.zeros(len(time))
    for beat in range(BEATS):
        peak = torch.exp(-(((time - beat - 0.5) / 0.03) ** 2))
        lead += -peak if beat == odd else peak
        lead += 0.25 * torch.exp(-(((time - beat - 0.75) / 0.06) ** 2))
    return torch.stack([lead, 0.5 * lead + 0.1 * torch.sin(2 * time)]) + 0.03 * torch.randn(2, len(time))


def block(inputs: int, outputs: int, size: int, stride: int = 1) -> list[nn.Module]:
    """Convolution, batch norm and ReLU."""
    return [nn.Conv1d(inputs, outputs, size, stride, size // 2), nn.BatchNorm1d(outputs), nn.ReLU()]


def main() -> None:
    """Train, explain, draw."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "tsgb-out")
    torch.manual_seed(0)
    layers = [*block(2, 16, 9, 2), nn.MaxPool1d(2), *block(16, 32, 9), *block(32, 32, 5)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 2))
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        odd = [int(beat) if beat < BEATS else None for beat in torch.randint(0, 2 * BEATS, (32,))]
        batch = torch.stack([recording(beat) for beat in odd])
        loss = functional.cross_entropy(model(batch), torch.tensor([int(beat is not None) for beat in odd]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()

    explanation = tsgb.explain(model, torch.stack([recording(2), recording(4)]), target=1)  # maps (2, 1, 600)
    for path in explanation.save(folder / "series"):
        print(path)
    for map in explanation.maps[:, 0]:
        print(f"strongest evidence in second {map.argmax() / RATE:.2f}")


if __name__ == "__main__":
    main()
