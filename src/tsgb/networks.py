"""Two small classifiers of the ten classes of `scenes`, with their weights in the package: no download.

`bundled` has residual blocks and one linear head after global average pooling; `bundled_vgg` is a plain chain of
convolutions and max pooling with three linear layers. Both were trained by `training/train.py` on scenes of one to
four objects with the soft target 1/n for each of the n classes present. The JSON record beside each weights file
says how, and what accuracy was measured on scenes that the training did not see.
"""

from importlib import resources
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor, nn

from tsgb.scenes import CLASSES

# What an image must be before it enters either network: resized to size x size pixels, RGB divided by 255, less mean,
# divided by std.
INPUT: dict[str, Any] = {"size": 128, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

# The seeds of the scenes that the weights were fitted to; every other seed's scene is new to the networks.
TRAINING_SEEDS = range(1_000_000_000, 1_000_024_000)


Network = TypeVar("Network", bound=nn.Module)


class Residual(nn.Module):
    """Two 3 x 3 convolutions added to a shortcut: (N, inputs, H, W) to (N, outputs, H / stride, W / stride).

    >>> Residual(8, 16, stride=2)(torch.zeros(1, 8, 32, 32)).shape
    torch.Size([1, 16, 16, 16])
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        """Make the block; where its shape changes, the shortcut is a strided 1 x 1 convolution."""
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        y = self.relu1(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return self.relu2(y + self.shortcut(x))  # type: ignore[no-any-return]


class Bundled(nn.Module):
    """Residual network: (N, 3, 128, 128) float, as INPUT says, to (N, 10) logits of the classes `names`.

    Its last feature maps are 8 x 8; any other input size works too.

    >>> Bundled()(torch.zeros(1, 3, 128, 128)).shape
    torch.Size([1, 10])
    """

    names = CLASSES

    def __init__(self) -> None:
        """Make the network with random weights."""
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.blocks = nn.Sequential(
            Residual(24, 32, stride=2),
            Residual(32, 64, stride=2),
            Residual(64, 64),
            Residual(64, 96, stride=2),
            Residual(96, 96),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(96, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """Score a batch."""
        return self.head(self.flatten(self.pool(self.blocks(self.stem(x)))))  # type: ignore[no-any-return]


class BundledVGG(nn.Module):
    """Plain chain with three linear layers: (N, 3, 128, 128) float, as INPUT says, to (N, 10) logits of `names`.

    Its last convolution sees 8 x 8 places, its first linear layer 2 x 2; only inputs of 128 x 128 fit.

    >>> BundledVGG()(torch.zeros(1, 3, 128, 128)).shape
    torch.Size([1, 10])
    """

    names = CLASSES

    def __init__(self) -> None:
        """Make the network with random weights."""
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for channels, pool in (((16,), 2), ((32,), 2), ((64,), 2), ((96, 96), 2), ((128, 128), 4)):
            for outputs in channels:
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
                inputs = outputs
            layers.append(nn.MaxPool2d(pool))
        self.features = nn.Sequential(*layers)
        self.flatten = nn.Flatten()
        self.classifier = nn.Sequential(
            nn.Linear(128 * 2 * 2, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, len(CLASSES))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Score a batch."""
        return self.classifier(self.flatten(self.features(x)))  # type: ignore[no-any-return]


def bundled(pretrained: bool = True) -> Bundled:
    """Return the residual network in eval mode, float32, on the CPU.

    `pretrained=False` leaves the weights random, from torch's global generator.

    >>> network = bundled()
    >>> network.training, network.names[1]
    (False, 'star')
    """
    return _loaded(Bundled(), "bundled") if pretrained else Bundled().eval()


def bundled_vgg(pretrained: bool = True) -> BundledVGG:
    """Return the plain network in eval mode, float32, on the CPU.

    `pretrained=False` leaves the weights random, from torch's global generator.

    >>> network = bundled_vgg()
    >>> sum(isinstance(layer, nn.Linear) for layer in network.modules())
    3
    """
    return _loaded(BundledVGG(), "bundled-vgg") if pretrained else BundledVGG().eval()


def inputs(images: npt.NDArray[np.uint8]) -> Tensor:
    """Turn images, (N, 128, 128, 3) uint8 RGB, into the (N, 3, 128, 128) float32 that the networks take.

    >>> inputs(np.full((2, 128, 128, 3), 255, dtype=np.uint8)).unique()
    tensor([1.])
    """
    mean, std = torch.tensor(INPUT["mean"]), torch.tensor(INPUT["std"])
    return ((torch.from_numpy(images) / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def _loaded(network: Network, name: str) -> Network:
    stored = safetensors.torch.load((resources.files("tsgb") / "weights" / f"{name}.safetensors").read_bytes())
    network.load_state_dict(stored)  # copies into float32
    return network.eval()
