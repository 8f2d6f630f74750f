"""Explain networks that nobody picked by hand: torchvision's classifiers, and the smallest of every family of timm.

    python benchmarks/zoo.py [--names resnet18,timm/dla34] [--library torchvision] [--smallest 2] [--part 1/4]

Every network has random weights from one seed, scales of its norms drawn too and their statistics taken from noise, and
gets two images and the two classes for each that it ranks highest. Asked of each, with the rules FUSED, PIXELS and
PAPER: finite maps that are not empty, a rule for every operator that carries weights or bends, weights and modes as
they were, in float64 the same map of an image alone as in the batch, to 1e-8; and where the network traces, the same
from the compiled graph. How far the float32 map lies from that of float64 is told, not asked: it is the network's
condition, and where that is bad float64 is held to a millionth of it.
Prints Markdown, one line a network. The exit status is 1 if a network failed that was not refused as out of scope.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import tsgb
from tsgb import rules, vision

SIDE = 96
CLOSE, CLOSE_OF_OFF = 1e-8, 1e-6  # of a map in float64, and of how far float32 is off
TABLES = {"FUSED": rules.FUSED, "PIXELS": rules.PIXELS, "PAPER": rules.PAPER}


@dataclass
class Row:
    """What came of one network; ``failures`` says what was asked and not given."""

    name: str
    weights: int = 0
    refusal: str = ""
    failures: list[str] = field(default_factory=list)
    compiled: str = ""
    off: float = 0.0  # the float32 map, from that of float64
    seconds: float = 0.0

    def line(self) -> str:
        """One line of the table."""
        verdict = self.refusal or "; ".join(self.failures) or "explained"
        off = "" if self.refusal else f"{self.off:.0e}"
        return f"| {self.name} | {self.weights / 1e6:.1f} | {verdict} | {off} | {self.compiled} | {self.seconds:.0f} |"


def main() -> None:
    """Print the table."""
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", default="", help="networks, timm's with timm/ before")
    parser.add_argument("--library", default="torchvision,timm")
    parser.add_argument("--smallest", type=int, default=2, help="how many of each family of timm")
    parser.add_argument("--part", default="1/1", help="2/4 is the second quarter of them")
    args = parser.parse_args()
    names = args.names.split(",") if args.names else [*found(args.library.split(","), args.smallest)]
    part, parts = map(int, args.part.split("/"))
    print(
        "| network | million weights | | float32 off float64 | compiled | seconds |\n|---|---:|---|---:|---|---:|",
        flush=True,
    )
    rows = []
    for name in names[part - 1 :: parts]:
        rows.append(row(name))
        print(rows[-1].line(), flush=True)
    failed = sum(bool(row.failures) for row in rows)
    refused = sum(bool(row.refusal) for row in rows)
    print(f"\n{len(rows) - failed - refused} explained, {refused} refused as out of scope, {failed} failed.")
    sys.exit(failed > 0)


def found(libraries: list[str], smallest: int) -> Iterator[str]:
    """Name torchvision's classifiers, and the smallest of each family of timm by the number of their weights."""
    if "torchvision" in libraries:
        models = vision.import_torchvision().models
        yield from models.list_models(module=models)
    if "timm" in libraries:
        vision.import_torchvision()
        import timm

        for family in timm.list_modules():
            sizes = []
            for name in timm.list_models(module=family):
                try:
                    with torch.device("meta"):
                        sizes.append((sum(p.numel() for p in timm.create_model(name).parameters()), name))
                except Exception:  # some cannot be made without memory
                    continue
            yield from (f"timm/{name}" for _, name in sorted(sizes)[:smallest])


def row(name: str) -> Row:
    """Make a network and explain it."""
    start, result = time.perf_counter(), Row(name)
    try:
        model, side = made(name)
        result.weights = sum(p.numel() for p in model.parameters())
        check(model, torch.rand(2, 3, side, side), result)
    except tsgb.CoverageError as error:
        if "out of its scope" in str(error) or "no convolution" in str(error):
            reasons = ("attention", "recurrent layer", "no convolution")
            result.refusal = "refused: " + next(reason for reason in reasons if reason in str(error))
        else:
            result.failures.append(f"CoverageError: {error}")
    except Exception as error:
        result.failures.append(f"{type(error).__name__}: {str(error)[:120]}")
    result.seconds = time.perf_counter() - start
    return result


def made(name: str) -> tuple[nn.Module, int]:
    """Make a network with drawn weights, and say how large its images are to be."""
    torch.manual_seed(0)
    models = vision.import_torchvision().models
    if name.startswith("timm/"):
        import timm

        model = timm.create_model(name.removeprefix("timm/")).eval()
        own = model.default_cfg["input_size"][-1]
    else:
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model, own = models.get_model(name, weights=None, **options).eval(), 224
    draw(model)
    try:
        accustom(model, SIDE)
    except (RuntimeError, AssertionError, ValueError):  # it takes images of its own size alone
        accustom(model, own)
        return model, own
    return model, SIDE


def draw(model: nn.Module) -> None:
    """Draw what is constant at the start, biases and scales, some of which would leave a branch empty."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        values = parameter.data
        if values.numel() > max(values.shape, default=0):
            if values.std() < 1e-4:
                values.normal_(0, values[0].numel() ** -0.5, generator=generator)
        elif "bias" in name:
            values.normal_(0, 0.1, generator=generator)
        else:
            values.uniform_(0.5, 1.5, generator=generator)


def accustom(model: nn.Module, side: int) -> None:
    """Take the statistics of batch norms from noise, as else values would grow from layer to layer."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    try:
        with torch.no_grad():
            model(torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(1)))
    finally:
        model.eval()


def check(model: nn.Module, images: Tensor, result: Row) -> None:
    """Ask of a network what this command asks; it is left in float64."""
    with torch.no_grad():
        logits = model(images)
    if logits.dim() > 2:  # an encoder's tokens
        tsgb.explain(model, images, lambda tokens: tokens.flatten(1).sum(1))
        result.failures.append("no logits")
        return
    classes = logits.topk(2).indices.tolist()
    before = state(model)
    single = {name: tsgb.explain(model, images, classes, rules=table) for name, table in TABLES.items()}
    if state(model) != before:
        result.failures.append("weights or modes changed")
    for name, explanation in single.items():
        if not explanation.maps.isfinite().all():
            result.failures.append(f"{name}: not finite")
        if not explanation.maps.flatten(2).any(2).all():
            result.failures.append(f"{name}: empty")
        missed = sorted({operator for operator, rule, _ in explanation.coverage if rule is None})
        if missed:
            result.failures.append(f"{name}: no rule for {', '.join(missed)}")
    model.double()
    images = images.double()
    for name, table in TABLES.items():
        maps = tsgb.explain(model, images, classes, rules=table).maps
        result.off = max(result.off, relative(single[name].maps.double(), maps))
        alone = relative(tsgb.explain(model, images[:1], classes[:1], rules=table).maps, maps[:1])
        close = max(CLOSE, CLOSE_OF_OFF * result.off)
        result.failures += [f"{name}: alone {alone:.0e}"] * (not alone < close)
    try:
        explainer = tsgb.compile(model, images, classes, backend="eager")
    except RuntimeError as error:
        if "traced" not in str(error) and "random" not in str(error):
            raise
        result.compiled = "not traced"
    else:
        off = relative(explainer(images, classes).maps, tsgb.explain(model, images, classes).maps)
        is_same = off < max(CLOSE, CLOSE_OF_OFF * result.off)
        result.compiled = "same" if is_same else f"off by {off:.0e}"
        result.failures += ["compiled"] * (not is_same)


def state(model: nn.Module) -> list[object]:
    """What an explanation has to leave as it was."""
    tensors = [*model.parameters(), *model.buffers()]
    values = [float(t.detach().double().sum()) for t in tensors]
    modes = [(module.training, len(module._forward_hooks)) for module in model.modules()]
    return [values, modes, [(t.requires_grad, t.grad is None, t._version) for t in tensors]]


def relative(ours: Tensor, theirs: Tensor) -> float:
    """How far one map lies from another."""
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-300))


if __name__ == "__main__":
    main()
