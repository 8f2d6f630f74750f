"""Measure what a map costs, as multiples of the prediction: time and peak memory, beside other methods.

    python benchmarks/speed.py [--device cuda] [--dtype bfloat16] [--networks vgg16,resnet50] [--batches 1,8]

The networks are torchvision's with random weights. Every round runs the plain forward under inference mode and then
each method once, so that what disturbs the machine disturbs all; a first round warms up; the table has medians. Peak
memory is how far a call lifts it above that of the loaded model and its input, each in a fresh process. K classes are
explained in one call; a rival that takes one class is run once. Prints Markdown.
"""

import argparse
import importlib.util
import multiprocessing
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import tsgb
from tsgb import rules, vision

NETWORKS = ("vgg16", "resnet50", "mobilenet_v2", "convnext_tiny")
CLASSES = (1, 20, 100)

Run = Callable[[nn.Module, Tensor, Tensor], object]


def forward(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """The prediction, which all else is measured by."""
    with torch.inference_mode():
        logits: Tensor = model(images)
    return logits


def gradient(model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """A plain gradient at the image; the weights ask for none."""
    leaf = images.clone().requires_grad_()
    return torch.autograd.grad(model(leaf).gather(1, targets[:, :1]).sum(), leaf)


def captum(name: str, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """One of Captum's methods, for one class."""
    from captum import attr

    options = (_last_features(model),) if name == "LayerGradCam" else ()
    found: Tensor = getattr(attr, name)(model, *options).attribute(images.clone(), targets[:, 0])
    return found


def zennit(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """Zennit's EpsilonPlusFlat, for one class."""
    from zennit.composites import EpsilonPlusFlat

    leaf = images.clone().requires_grad_()
    with EpsilonPlusFlat().context(model) as changed:
        (found,) = torch.autograd.grad(changed(leaf).gather(1, targets[:, :1]).sum(), leaf)
    return found


def ours(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """TSGB for all targets."""
    return tsgb.explain(model, images, targets).maps


def plain(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """TSGB with every rule in its plain form, gradient in and gradient out."""
    return tsgb.explain(model, images, targets, rules=_plainly(rules.DEFAULT)).maps


METHODS: dict[str, tuple[Run, int]] = {
    "forward": (forward, 1),
    **{f"TSGB, K = {k}": (ours, k) for k in CLASSES},
    "TSGB, plain form, K = 1": (plain, 1),
    "input gradient": (gradient, 1),
    "captum Saliency": (partial(captum, "Saliency"), 1),
    "captum GuidedBackprop": (partial(captum, "GuidedBackprop"), 1),
    "captum LayerGradCam": (partial(captum, "LayerGradCam"), 1),
    "zennit EpsilonPlusFlat": (zennit, 1),
}


def main() -> None:
    """Print one table for each network and batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="by autocast")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    print(f"{_machine(args.device)}, torch {torch.__version__}, {args.dtype}\n", flush=True)
    for network in args.networks.split(","):
        for batch in map(int, args.batches.split(",")):
            setting = network, batch, args.device, args.dtype
            print(f"{network}, batch {batch}\n\n| | time | [low, high] | peak memory |\n|---|---:|---:|---:|")
            times = _fresh(_times, *setting, args.rounds)
            memory = {name: _fresh(_peak, *setting, name) for name in times}
            for name, ratios in times.items():
                middle = statistics.median(ratios)
                share = memory[name] / memory["input gradient"]
                print(f"| {name} | {middle:.2f} | [{min(ratios):.2f}, {max(ratios):.2f}] | {share:.2f} |", flush=True)
            print(f"\nA forward takes 1; memory is in input gradients of {memory['input gradient'] / 2**20:.0f} MiB.\n")


def _times(network: str, batch: int, device: str, dtype: str, rounds: int) -> dict[str, list[float]]:
    """Times of each method in each round, over the median forward's."""
    model, images = _loaded(network, batch, device)
    spent: dict[str, list[float]] = {name: [] for name in METHODS if name[:6] != "zennit" or _has("zennit")}
    for number in range(-1, rounds):
        for name in spent:
            run, k = METHODS[name]
            with _precision(device, dtype):
                seconds = _seconds(partial(run, model, images, _targets(batch, k, device)), device)
            if number >= 0:
                spent[name].append(seconds)
    middle = statistics.median(spent["forward"])
    return {name: [seconds / middle for seconds in found] for name, found in spent.items()}


def _peak(network: str, batch: int, device: str, dtype: str, name: str) -> float:
    """Bytes by which a method lifts this process's peak."""
    model, images = _loaded(network, batch, device)
    run, k = METHODS[name]
    targets = _targets(batch, k, device)
    toy = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1000))
    run(
        toy.to(device).eval(), images[:1, :, :9, :9].clone(), targets[:1]
    )  # what it imports is no part of what it needs
    with _precision(device, dtype):
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run(model, images, targets)
            return float(torch.cuda.max_memory_allocated() - before)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
        resident = _status("VmRSS")
        run(model, images, targets)
        return float(_status("VmHWM") - resident)


def _loaded(network: str, batch: int, device: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model: nn.Module = vision.import_torchvision().models.get_model(network, weights=None).eval().to(device)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model, torch.randn(batch, 3, 224, 224).to(device)


def _targets(batch: int, k: int, device: str) -> Tensor:
    return torch.stack([torch.randperm(1000, generator=torch.Generator().manual_seed(n))[:k] for n in range(batch)]).to(
        device
    )


def _last_features(model: nn.Module) -> nn.Module:
    found: nn.Module = next((getattr(model, name) for name in ("layer4", "features") if hasattr(model, name)), model)
    return found if found is not model else next(model.children())


def _plainly(table: rules.Table) -> rules.Table:
    """The same rules as functions that the mechanism does not know, so that it runs them in their plain form."""

    def wrapped(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda grad, x, *args, o=None, **kwargs: rule(grad, x, *args, **kwargs)

    roles = {role: {op: wrapped(r) for op, r in table[role].items()} for role in (rules.CONSTANT, rules.GATE)}
    return {op: wrapped(r) if callable(op) and callable(r) else r for op, r in table.items()} | roles


@contextmanager
def _precision(device: str, dtype: str) -> Iterator[None]:
    with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
        yield


def _seconds(run: Callable[[], object], device: str) -> float:
    if device != "cpu":  # by the device's own clock
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        run()
        after.record()
        torch.cuda.synchronize()
        return float(before.elapsed_time(after)) / 1000
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _fresh(function: Callable[..., object], *args: object) -> object:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def _machine(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    return f"{found[1] if found else platform.processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
