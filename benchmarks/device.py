"""Explain on a device that is not the CPU, where no GPU is at hand: what mixes tensors of two devices fails as on one.

    python benchmarks/device.py [--networks mobilenet_v2,resnet18]

Compiles `device.cpp`, a device of torch's own kind that reckons on the CPU, with the machine's C++ compiler, and moves
networks with random weights and the bundled ones to it, and parts of one in every way. Asked of each: the maps of the
CPU, from the rules FUSED, PIXELS and PAPER, for classes, a callable and Captum's shape, and from a traced graph;
and of one bundled network every method of the registry, overlays, boxes and files.
Speed, streams, autocast and precision are another device's own, and are not asked here. The exit status is 1 if
something failed or differed.
"""

import argparse
import copy
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils import cpp_extension

import tsgb
from tsgb import methods, rules, vision

NETWORKS = "mobilenet_v2,resnet18,vgg11,densenet121,squeezenet1_1,convnext_tiny,efficientnet_b0,regnet_y_400mf"
TABLES = {"FUSED": rules.FUSED, "PIXELS": rules.PIXELS, "PAPER": rules.PAPER}
CLASSES = [[1, 2], [3, 4]]
NAME, CLOSE = "second", 1e-9  # in float64

Asked = Iterator[tuple[str, Callable[[], float]]]


def main() -> None:
    """Make the device, ask, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=NETWORKS)
    args = parser.parse_args()
    make_device()
    failed = 0
    for name in [name for name in args.networks.split(",") if name]:
        torch.manual_seed(0)
        model = vision.import_torchvision().models.get_model(name, weights=None).eval().double()
        images = torch.rand(2, 3, 96, 96).double()
        failed += told(name, asked(model, images, copy.deepcopy(model).to(NAME), images.to(NAME)))
    for name in ("bundled", "bundled-vgg"):
        network = tsgb.load(name)
        originals = [Image.fromarray(tsgb.scenes.render(seed, count=2).image) for seed in (0, 1)]
        images = torch.stack([network.preprocessing.tensor(image) for image in originals]).double()
        model = network.model.double()
        moved, there = copy.deepcopy(model).to(NAME), images.to(NAME)
        failed += told(name, asked(model, images, moved, there))
        if name == "bundled":
            failed += told(name, asked_of_all(model, images, moved, there, originals, network.preprocessing))
    whole = Parts(*["cpu"] * 5).eval().double()
    images = torch.rand(2, 3, 21, 20).double()
    for number in range(1, 2**5):
        places = [NAME if number >> place & 1 else "cpu" for place in range(5)]
        failed += told("on " + ", ".join(places), asked(whole, images, whole.on(*places), images.to(places[0])))
    print(f"{failed} failed.")
    sys.exit(failed > 0)


def make_device() -> None:
    """Compile the device, and give torch the module that it asks for."""
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "device.so")
        subprocess.run(
            ["c++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", f"-D_GLIBCXX_USE_CXX11_ABI={_abi()}"]
            + [f"-I{path}" for path in cpp_extension.include_paths()]
            + [str(Path(__file__).with_suffix(".cpp")), "-o", str(library)]
            + [f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"],
            check=True,
        )
        torch.ops.load_library(library)
    torch.utils.generate_methods_for_privateuse1_backend()


def _abi() -> int:
    return int(torch._C._GLIBCXX_USE_CXX11_ABI)


def _module() -> types.ModuleType:
    module = types.ModuleType(f"torch.{NAME}")
    answers = {"is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0}
    for name, answer in answers.items():
        setattr(module, name, lambda answer=answer: answer)
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    return module


def told(name: str, questions: Asked) -> int:
    """Ask, print what came of each, count what failed."""
    failed = 0
    for question, answer in questions:
        try:
            off = answer()
            verdict = "same" if off < CLOSE else f"off by {off:.0e}"
        except Exception as error:
            verdict = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        failed += verdict != "same"
        print(f"{name}: {question}: {verdict}", flush=True)
    return failed


class Parts(nn.Module):
    """A network whose parts may lie on two devices: what goes on from the first, two branches, two heads."""

    def __init__(self, *places: str) -> None:
        """``places``: devices of the first part, a branch, the other, a head and the other."""
        super().__init__()

        def convolved(channels: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())

        def judged() -> nn.Sequential:
            pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten()
            return nn.Sequential(convolved(16), *pooled, nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))

        parts = [nn.Sequential(convolved(3), nn.MaxPool2d(2)), convolved(8), convolved(8), judged(), judged()]
        self.parts, self.places = nn.ModuleList(parts), places

    def on(self, *places: str) -> nn.Module:
        """A copy on other devices."""
        moved = Parts(*places).eval().double()
        moved.load_state_dict(self.state_dict())
        for part, place in zip(moved.parts, places, strict=True):
            part.to(place)
        return moved

    def forward(self, x: Tensor) -> Tensor:
        """Logits, on the device of the last."""
        left, right, head, other = self.places[1:]
        below, a, b, above, beside = self.parts
        x = below(x)
        joined = x.to(left) + a(x.to(left)), b(x.to(right))
        logits = [
            judge(torch.cat([t.to(place) for t in joined], 1)) for judge, place in ((above, head), (beside, other))
        ]
        return logits[0].to(other) + logits[1]


def asked(model: nn.Module, images: Tensor, moved: nn.Module, there: Tensor) -> Asked:
    """Questions to a network and the same elsewhere: how far its map there lies from that of the CPU."""

    def both(explained: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[], float]:
        return lambda: relative(explained(moved, there), explained(model, images))

    for name, table in TABLES.items():
        targets = {"classes": CLASSES, "top2": "top2", "a difference": lambda output: output[:, 3] - output[:, 4]}
        for kind, target in targets.items():
            yield f"{name}, {kind}", both(partial(maps, target, table))
        yield f"{name}, traced", both(partial(traced, table))
    yield "Captum's shape", both(lambda m, x: tsgb.TSGB(m).attribute(x, target=3))


def maps(target: object, table: rules.Table, model: nn.Module, images: Tensor) -> Tensor:
    """The maps of one explanation."""
    return tsgb.explain(model, images, target, rules=table).maps


def traced(table: rules.Table, model: nn.Module, images: Tensor) -> Tensor:
    """The maps of a traced graph."""
    return tsgb.compile(model, images, CLASSES, rules=table, backend="eager")(images, CLASSES).maps


def asked_of_all(
    model: nn.Module,
    images: Tensor,
    moved: nn.Module,
    there: Tensor,
    originals: list[Image.Image],
    preprocessing: object,
) -> Asked:
    """Questions to one network: every method, and what is made of a map."""
    targets = torch.tensor(CLASSES)
    for name in methods.METHODS:
        yield (
            name,
            lambda name=name: relative(
                methods.attribute(name, moved, there, targets.to(NAME)), methods.attribute(name, model, images, targets)
            ),
        )
    ours, theirs = (tsgb.explain(*pair, CLASSES) for pair in ((moved, there), (model, images)))

    def drawn(e: tsgb.Explanation) -> bytes:
        return e.overlay(originals[1], target=1, preprocessing=preprocessing).tobytes()

    def saved(e: tsgb.Explanation) -> list[bytes]:
        with tempfile.TemporaryDirectory() as folder:
            return [path.read_bytes() for path in sorted(e.save(folder)) if path.suffix == ".png"]

    yield "overlay", lambda: float(drawn(ours) != drawn(theirs))
    yield "boxes", lambda: float(str(ours.boxes(0.3)) != str(theirs.boxes(0.3)))
    yield "files", lambda: float(saved(ours) != saved(theirs))


def relative(ours: Tensor, theirs: Tensor) -> float:
    """How far one map lies from another."""
    return float((ours.detach().cpu() - theirs.detach()).norm() / theirs.detach().norm())


if __name__ == "__main__":
    main()
