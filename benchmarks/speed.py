"""Measure what a map costs, as multiples of the prediction: time and peak memory, beside other methods.

    python benchmarks/speed.py [--device cuda] [--dtype bfloat16] [--networks vgg16,resnet50] [--batches 1,8]

The networks are torchvision's with random weights. Every round runs the plain forward under inference mode and then
each method once, so that what disturbs the machine disturbs all; a first round warms up; the table has medians. What
is compiled is also given as a multiple of the compiled forward. Peak memory is how far a call lifts it above that of
the loaded model and its input, each in a fresh process. K classes are explained in one call; a rival that takes one
class is run once. Prints Markdown.
"""

import argparse
import ctypes
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

Run = Callable[[], object]


def forward(model: nn.Module, images: Tensor, targets: Tensor) -> Run:
    """The prediction, which all else is measured by."""

    @torch.inference_mode()
    def run() -> object:
        return model(images)

    return run


def compiled_forward(model: nn.Module, images: Tensor, targets: Tensor) -> Run:
    """The prediction, compiled."""
    run = forward(torch.compile(model, dynamic=False), images, targets)
    run()
    return run


def gradient(model: nn.Module, images: Tensor, targets: Tensor) -> Run:
    """A plain gradient at the image; the weights ask for none."""

    def run() -> object:
        leaf = images.clone().requires_grad_()
        return torch.autograd.grad(model(leaf).gather(1, targets[:, :1]).sum(), leaf)

    return run


def captum(name: str, model: nn.Module, images: Tensor, targets: Tensor) -> Run:
    """One of Captum's methods, for one class."""
    from captum import attr

    options = (_last_features(model),) if name == "LayerGradCam" else ()
    method = getattr(attr, name)(model, *options)
    return lambda: method.attribute(images.clone(), targets[:, 0])


def zennit(model: nn.Module, images: Tensor, targets: Tensor) -> Run:
    """Zennit's EpsilonPlusFlat, for one class."""
    from zennit.composites import EpsilonPlusFlat

    def run() -> object:
        leaf = images.clone().requires_grad_()
        with EpsilonPlusFlat().context(model) as changed:
            return torch.autograd.grad(changed(leaf).gather(1, targets[:, :1]).sum(), leaf)

    return run


def ours(table: rules.Table, model: nn.Module, images: Tensor, targets: Tensor) -> Run:
    """TSGB for all targets."""
    return lambda: tsgb.explain(model, images, targets, rules=table).maps


def compiled(table: rules.Table, model: nn.Module, images: Tensor, targets: Tensor) -> Run:
    """TSGB for all targets, compiled."""
    explainer = tsgb.compile(model, images, targets, rules=table)
    return lambda: explainer(images, targets).maps


METHODS: dict[str, tuple[Callable[[nn.Module, Tensor, Tensor], Run], int]] = {
    "forward": (forward, 1),
    "forward, compiled": (compiled_forward, 1),
    **{
        f"TSGB{of}{how}, K = {k}": (partial(run, table), k)
        for of, table in ((" (fused)", rules.FUSED), (" (pixels)", rules.PIXELS))
        for how, run in (("", ours), (", compiled", compiled))
        for k in CLASSES
    },
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
    parser.add_argument("--methods", default="", help="the names of those wanted, with ; between")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    print(f"{_machine(args.device)}, torch {torch.__version__}, {args.dtype}\n", flush=True)
    for network in args.networks.split(","):
        for batch in map(int, args.batches.split(",")):
            setting = network, batch, args.device, args.dtype
            print(f"{network}, batch {batch}\n\n| | time | [low, high] | of the compiled forward | peak memory |")
            print("|---|---:|---:|---:|---:|", flush=True)
            times = _fresh(_times, *setting, args.rounds, args.methods.split(";"))
            memory = {name: _fresh(_peak, *setting, name) for name in times}
            quick = statistics.median(times["forward, compiled"])
            for name, ratios in times.items():
                middle = statistics.median(ratios)
                also = f"{middle / quick:.2f}" if "compiled" in name else ""
                share = memory[name] / memory["input gradient"]
                spread = f"[{min(ratios):.2f}, {max(ratios):.2f}]"
                print(f"| {name} | {middle:.2f} | {spread} | {also} | {share:.2f} |", flush=True)
            print(f"\nA forward takes 1; memory is in input gradients of {memory['input gradient'] / 2**20:.0f} MiB.\n")


BASELINES = ("forward", "forward, compiled", "input gradient")


def _times(network: str, batch: int, device: str, dtype: str, rounds: int, wanted: list[str]) -> dict[str, list[float]]:
    """Times of each method in each round, over the median forward's."""
    model, images = _loaded(network, batch, device)
    names = [name for name in METHODS if name in BASELINES or name in wanted or wanted == [""]]
    runs: dict[str, Run] = {}
    spent: dict[str, list[float]] = {}
    with _precision(device, dtype):
        for name in names:
            make, k = METHODS[name]
            if not name.startswith("zennit") or _has("zennit"):
                runs[name], spent[name] = make(model, images, _targets(batch, k, device)), []
        for number in range(-1, rounds):
            for name, run in runs.items():
                seconds = _seconds(run, device)
                if number >= 0:
                    spent[name].append(seconds)
    middle = statistics.median(spent["forward"])
    return {name: [seconds / middle for seconds in found] for name, found in spent.items()}


def _peak(network: str, batch: int, device: str, dtype: str, name: str) -> float:
    """Bytes by which a method lifts this process's peak."""
    model, images = _loaded(network, batch, device)
    make, k = METHODS[name]
    targets = _targets(batch, k, device)
    toy = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1000))
    with _precision(device, dtype):
        # What a method imports and compiles is no part of what a call needs.
        make(toy.to(device).eval(), images[:1, :, :9, :9].clone(), targets[:1])()
        run = make(model, images, targets)
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            return float(torch.cuda.max_memory_allocated() - before)
        ctypes.CDLL(None).malloc_trim(0)  # give back what compiling left
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
        resident = _status("VmRSS")
        run()
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
