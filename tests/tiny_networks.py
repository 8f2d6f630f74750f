"""Networks of a few weights, also as factories for `--model`: one that explains, and others with one thing wrong."""

import torch
from torch import nn

NAMES = ["cat", "dog", "owl", "fox", "hen"]
SAID = {"size": 32, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "names": NAMES}


def chain(*extra):
    """Convolution, batch norm, ReLU, what is given, pooling and a linear head for five classes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), *extra]
        return nn.Sequential(*body, nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()


class Act(nn.Module):
    """A layer that is one function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Training(nn.Sequential):
    """Whoever asks it for eval mode gets training mode."""

    def train(self, mode=True):
        return super().train(True)


class Counting(nn.Module):
    """Counts its calls in a buffer, as no network may while it is explained."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        with torch.no_grad():
            self.calls += 1
        return x


def cnn():
    return chain(), SAID


def unnamed():
    return chain(), {"size": 32}


def too_few_names():
    return chain(), {**SAID, "names": NAMES[:3]}


def too_many_names():
    return chain(), {**SAID, "names": [*NAMES, "eel"]}


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8), nn.ReLU(), nn.Linear(8, 5)), SAID


def sine():
    return chain(Act(torch.sin)), SAID


def training():
    return Training(*chain()), SAID


def counting():
    return chain(Counting()), SAID


def batch_dependent():
    return chain(Act(lambda x: x - x.mean(0, keepdim=True) / 2)), SAID


def _refuse(x):
    raise LookupError("no such layer\nin this network")


def failing():
    return chain(Act(_refuse)), SAID


def raising():
    raise ValueError("no weights here\nnor there")
