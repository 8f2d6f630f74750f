"""Networks whose maps are frozen in `frozen.npz`, and what of a map is kept there.

Weights and images come from numpy, seeded by name: torch's generator and its initialisers decide nothing.
"""

import importlib
import zlib
from functools import lru_cache

import numpy as np
import torch
from torch import nn
from torch.nn import functional

SEED = 17
PROJECTIONS, SAMPLES = 256, 144
PIECE = 2**14  # values of maps that are projected at once


def _random(*names, seed=SEED):
    """A numpy generator of names. `RandomState`, as its streams are the same in all releases."""
    return np.random.RandomState([seed, *(zlib.crc32(str(name).encode()) for name in names)])


def fill(model, seed=SEED):
    """Give a model weights that depend on their names alone, in float64 and evaluation mode."""
    model = model.double().eval()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        path, _, role = name.rpartition(".")
        filled = _filled(model.get_submodule(path), role, value.detach(), _random(name, seed=seed))
        if filled is not None:
            value.data.copy_(torch.from_numpy(np.asarray(filled)).reshape(value.shape))
    return model


def _filled(module, role, value, random):
    """The values of a parameter or buffer, or None where it keeps those that it has."""
    if not value.is_floating_point():
        return None
    shape = tuple(value.shape)
    if role == "running_mean":
        return random.normal(0, 0.1, shape)
    if role == "running_var":
        return random.uniform(0.5, 1.5, shape)
    if role == "bias" and value.dim() < 3:
        return random.normal(0, 0.05, shape)
    if role == "weight" and hasattr(module, "weight_shape"):  # timm's CondConv2d holds each expert's in a row
        return random.standard_normal(shape) * 1.4 / np.prod(module.weight_shape[1:]) ** 0.5
    if role == "weight" and isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        fan = module.in_channels / module.groups * np.prod(module.kernel_size) / np.prod(module.stride)
        return random.standard_normal(shape) * 1.4 / fan**0.5
    if role == "weight" and value.dim() > 1:
        gain = 1.0 if value.dim() == 2 else 1.4
        return random.standard_normal(shape) * gain / np.prod(shape[1:]) ** 0.5
    if role == "weight" and ("Norm" in type(module).__name__ or "Affine" in type(module).__name__):
        return random.uniform(0.5, 1.5, shape)
    if not isinstance(value, nn.Parameter) and role in dict(module.named_buffers(recurse=False)):
        return None
    if value.numel() and (value == value.flatten()[0]).all() and value.abs().max() > 1e-2:
        return None  # a constant, as the slope of a PReLU
    return random.uniform(0.2, 1.0, shape)  # what scales a branch, and begins at zero


def images(name, *shape, seed=SEED):
    return torch.from_numpy(_random("images", name, seed=seed).uniform(-1, 1, shape))


@lru_cache(maxsize=8)
def _projection(piece):
    return _random("projections", piece).standard_normal((PROJECTIONS, PIECE))


def kept(maps):
    """What the archive has of maps (N, K, *size), or of a tuple of them: norm, Gaussian projections, a subsample."""
    parts = [part.detach().cpu().double() for part in (maps if isinstance(maps, tuple) else (maps,))]
    values = torch.cat([part.flatten() for part in parts]).numpy()
    projections = np.zeros(PROJECTIONS)
    for piece, start in enumerate(range(0, len(values), PIECE)):
        here = values[start : start + PIECE]
        projections += _projection(piece)[:, : len(here)] @ here
    sample = parts[0][0, 0]
    side = int(SAMPLES ** (1 / sample.dim()) + 1e-9)
    for axis, size in enumerate(sample.shape):
        sample = sample.index_select(axis, torch.linspace(0, size - 1, min(side, size)).round().long())
    return np.concatenate([[np.linalg.norm(values)], projections, sample.flatten().numpy()])


class Waves(nn.Module):
    """One dimension."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(2, 8, 7, stride=2, padding=3),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.MaxPool1d(2),
            nn.Conv1d(8, 16, 5, padding=2, groups=2),
            nn.GELU(),
            nn.Conv1d(16, 16, 3, padding=2, dilation=2),
            nn.ReLU(),
            nn.AvgPool1d(2),
        )
        self.head = nn.Linear(16, 9)

    def forward(self, x):
        return self.head(self.body(x).mean(2))


class Volume(nn.Module):
    """Three dimensions, with a residual sum."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(1, 8, 3, stride=2, padding=1), nn.BatchNorm3d(8), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv3d(8, 8, 3, padding=1), nn.BatchNorm3d(8))
        self.last = nn.Sequential(nn.MaxPool3d(2), nn.Conv3d(8, 12, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1))
        self.head = nn.Linear(12, 9)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.last(functional.relu(x + self.branch(x))).flatten(1))


class TwoInputs(nn.Module):
    """Two images, of two sizes, that meet."""

    def __init__(self):
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(3, 8, 5, stride=2, padding=2), nn.BatchNorm2d(8), nn.ReLU())
        self.right = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU())
        self.both = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Linear(16, 9)

    def forward(self, x, y):
        return self.head(self.both(torch.cat([self.left(x), self.right(y)], 1)).mean((2, 3)))


class Transposed(nn.Module):
    """Down, up again by transposed convolutions, and a skip; a transposed convolution answers."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 4, stride=2, padding=1))
        self.up = nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1)
        self.skip = nn.Conv2d(3, 8, 1, bias=False)
        self.head = nn.ConvTranspose2d(8, 9, 2, stride=2)

    def forward(self, x):
        y = functional.relu(self.up(functional.relu(self.down(x))) + self.skip(x))
        return self.head(y).mean((2, 3))


class Segmenting(nn.Module):
    """Dilated, with a branch of global pooling, and scores at all positions, made larger."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 12, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU6(),
            nn.Conv2d(12, 16, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.near, self.far = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 3, padding=4, dilation=4)
        self.whole = nn.Conv2d(16, 8, 1)
        self.classify = nn.Sequential(nn.Conv2d(24, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 6, 1))

    def forward(self, x):
        y = self.body(x)
        whole = functional.relu(self.whole(functional.adaptive_avg_pool2d(y, 1))).expand(-1, -1, *y.shape[2:])
        y = torch.cat([functional.relu(self.near(y)), functional.relu(self.far(y)), whole], 1)
        return functional.interpolate(self.classify(y), size=x.shape[2:], mode="bilinear", align_corners=False)


def plain_chain():
    """Convolutions, ReLUs and a linear head, without a bias."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 5, stride=2, padding=2, bias=False),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(24, 24, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(96, 32, bias=False),
        nn.ReLU(),
        nn.Linear(32, 9, bias=False),
    )


def conv_head():
    """A 1 x 1 convolution with ReLU and pooling behind it as the head, below it other activations."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.LeakyReLU(0.1),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.PReLU(16),
        nn.AvgPool2d(3, 2, padding=1),
        nn.Conv2d(16, 24, 3, padding=1),
        nn.ELU(),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(24, 9, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


class Branches(nn.Module):
    """Branches inside of branches, which are concatenated, pooled, and summed."""

    def __init__(self):
        super().__init__()
        self.stem = self._layer(3, 12, 3, 2)
        self.one, self.three = self._layer(12, 8, 1), nn.Sequential(self._layer(12, 8, 1), self._layer(8, 8, 3))
        self.before, self.wide, self.high = self._layer(12, 8, 1), self._layer(8, 6, (1, 3)), self._layer(8, 6, (3, 1))
        self.pooled = nn.Sequential(nn.AvgPool2d(3, 1, 1), self._layer(12, 8, 1))
        self.join = self._layer(36, 12, 1)
        self.head = nn.Linear(24, 9)

    @staticmethod
    def _layer(ins, outs, kernel, stride=1):
        padding = tuple(side // 2 for side in kernel) if isinstance(kernel, tuple) else kernel // 2
        conv = nn.Conv2d(ins, outs, kernel, stride, padding, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outs, eps=1e-3), nn.ReLU(inplace=True))

    def forward(self, x):
        x = self.stem(x)
        inner = self.before(x)
        y = torch.cat([self.one(x), self.three(x), self.wide(inner), self.high(inner), self.pooled(x)], 1)
        y = functional.max_pool2d(x + self.join(y), 3, 2)
        return self.head(torch.cat([y.mean((2, 3)), y.amax((2, 3))], 1))


class Dense(nn.Module):
    """Each layer reads all before it, norms first."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 6 * step) for step in range(5))
        self.convs = nn.ModuleList(nn.Conv2d(8 + 6 * step, 6, 3, padding=1, bias=False) for step in range(4))
        self.head = nn.Linear(32, 9)

    def forward(self, x):
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=False):
            x = torch.cat([x, conv(functional.relu(norm(x)))], 1)
        return self.head(functional.relu(self.norms[-1](x)).mean((2, 3)))


class PositionsFirst(nn.Module):
    """Channels last between the convolutions, and a linear head on positions that come first."""

    def __init__(self):
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 12, 4, stride=4), nn.Conv2d(12, 12, 5, padding=2, groups=12)
        self.norm, self.wide, self.narrow = nn.LayerNorm(12), nn.Linear(12, 32), nn.Linear(32, 12)
        self.head = nn.Linear(12, 9)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(self.deep(x).permute(0, 2, 3, 1))
        x = x + self.narrow(functional.gelu(self.wide(y))).permute(0, 3, 1, 2)
        return self.head(x.flatten(2).permute(2, 0, 1)).mean(0)


class Gated(nn.Module):
    """Squeeze and excitation, a gate at each position, SiLU by hand, and a group norm."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.GroupNorm(4, 16)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.conv, self.where = nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.Conv2d(16, 1, 3, padding=1)
        self.head = nn.Linear(16, 9)

    def forward(self, x):
        x = self.norm(self.stem(x))
        x = x * torch.sigmoid(x)
        x = x * self.excite(functional.relu(self.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()
        x = functional.relu(self.conv(x)) * functional.hardsigmoid(self.where(x)) + x
        return self.head(functional.hardswish(x).mean((2, 3)))


def _most(output):
    """Class 1's scores, summed over where it wins."""
    return (output[:, 1] * (output.argmax(1) == 1)).sum((1, 2))


def _difference(output):
    return (output[:, 2] - output[:, 4]).mean((1, 2))


# Each: what builds it, the shapes of its inputs but for the batch, its number of classes.
_SPELLED = {
    "waves": (Waves, [(2, 256)], 9),
    "volume": (Volume, [(1, 20, 24, 24)], 9),
    "two_inputs": (TwoInputs, [(3, 96, 96), (1, 48, 48)], 9),
    "transposed": (Transposed, [(3, 96, 96)], 9),
    "segmenting": (Segmenting, [(3, 96, 96)], None),
    "plain_chain": (plain_chain, [(3, 96, 96)], 9),
    "conv_head": (conv_head, [(3, 96, 112)], 9),
    "branches": (Branches, [(3, 96, 96)], 9),
    "dense": (Dense, [(3, 96, 96)], 9),
    "positions_first": (PositionsFirst, [(3, 96, 96)], 9),
    "gated": (Gated, [(3, 96, 96)], 9),
}

_VISION = (
    "resnet18",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "squeezenet1_1",
    "shufflenet_v2_x0_5",
    "densenet121",
    "efficientnet_b0",
    "regnet_y_400mf",
    "googlenet",
)
_TIMM = (
    "convnext_atto",
    "convnextv2_atto",
    "tf_efficientnet_cc_b0_4e",
    "test_mambaout",
    "test_nfnet",
    "test_byobnet",
    "test_efficientnet_gn",
    "regnetx_002",
    "resnest14d",
    "skresnet18",
    "hrnet_w18_small",
    "dla46_c",
    "ghostnet_050",
    "repvgg_a0",
    "mixnet_s",
)

NAMES = [*_SPELLED, *_VISION, *(f"timm_{name}" for name in _TIMM)]


def build(name):
    """A network of `NAMES`, its inputs, and two targets: of one class and of three an image, or two functions.

    Raises:
        ImportError: the library that has it is missing.
    """
    if name in _SPELLED:
        make, shapes, classes = _SPELLED[name]
        model = make()
    else:
        library, shapes, classes = from_timm if name.startswith("timm_") else from_torchvision, [(3, 96, 96)], 1000
        model = library(name.removeprefix("timm_"))
    inputs = [images(f"{name} {index}", 2, *shape) for index, shape in enumerate(shapes)]
    one, three = torch.tensor([[3], [7]]), torch.tensor([[3, 7, 1], [7, 0, 5]])
    targets = (one, three) if classes else (_most, _difference)
    return fill(model), inputs[0] if len(inputs) == 1 else tuple(inputs), *targets


def from_torchvision(name):
    models = _torchvision().models
    without = {"init_weights": False} if name == "googlenet" else {}
    return getattr(models, name)(weights=None, **without)


def from_timm(name):
    _torchvision()  # which timm would import by itself
    return importlib.import_module("timm").create_model(name, pretrained=False)


def _torchvision():
    from tsgb.vision import import_torchvision

    try:
        return import_torchvision()
    except ValueError as error:
        raise ImportError(str(error)) from error
