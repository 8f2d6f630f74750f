"""Measure what docs/results.md states, and put the tables there: every run is one `tsgb bench` command of that page.

    python benchmarks/results.py --shared ../shared --out results [NAME ...]

Runs go on where they were killed. Each table of the page stands between `<!-- NAME -->` and `<!-- end -->`.
"""

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

from tsgb.bench.protocol import FIGURES
from tsgb.methods import METHODS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "results.md"

_BOXES = "box_accuracy,max_box_accuracy"
_CLEAR = f"pointing,energy,box_ap,{_BOXES}"
_MASKS = f"mask_ap,{_CLEAR}"
_CHECKS = "insertion,deletion,sensitivity,random_logit,cascade"
_ALL = (
    "tsgb-fused,tsgb-pixels,tsgb-paper,gradcam,layercam,gradient,inputxgradient,guided,deconvnet,guided-gradcam,ebp,cebp,"
    "deeplift,lrp,center,random"
)
_LARGE = "tsgb-fused,tsgb-pixels,tsgb-paper,gradcam,layercam,gradient,guided,guided-gradcam,ebp,cebp,center,random"
_SLOW = "tsgb-fused,gradcam,smoothgrad,integrated-gradients,occlusion,rise"
_CHECKED = "tsgb-fused,tsgb-pixels,tsgb-paper,gradcam,layercam,gradient,guided,cebp,random"
#: The default was chosen by the images of even index, and by the first 400 scenes: figures are of none of them.
_UNSEEN, _UNSEEN_SCENES = "1::2", "500:700"

_NETWORKS = {
    "bundled": "",
    "mobilenet": "--model mobilenet_v2 --weights $SHARED/weights/mobilenet_v2_qat_dequant.pth",
    "squeezenet": "--model squeezenet1_1 --weights $SHARED/weights/squeezenet1_1_mxnet.pth",
    "darknet": "--model $SHARED/tools/nets.py:tiny_darknet --weights $SHARED/weights/tiny_darknet_imagenet.pth "
    "--mean 0 --std 1",
    "deeplab": "--model $SHARED/tools/nets.py:deeplab_voc --weights $SHARED/weights/deeplabv3_mnv2_voc.pth --size 513 "
    "--mean 0.5 --std 0.5",
}  # fmt: skip
_IMAGENET = ("mobilenet", "squeezenet", "darknet")


def _run(network: str, data: str, methods: str, metrics: str, limit: int | None = None) -> str:
    given = f"--data $SHARED/data/{data} --images {_UNSEEN}" if data else f"--images {_UNSEEN_SCENES}"
    first = "" if limit is None else f"--limit {limit}"
    return " ".join(f"{_NETWORKS[network]} {given} --methods {methods} --metrics {metrics} {first}".split())


#: What follows `tsgb bench`, by the name of its table.
RUNS: dict[str, str] = {
    "scenes": _run("bundled", "", _ALL, f"{_MASKS},grid,grid_ap", 200),
    **{f"imagenet-{name}": _run(name, "imagenet_val400", _ALL, _CLEAR, 200) for name in _IMAGENET},
    **{f"masks-{name}": _run(name, "coco_voc", _ALL, _MASKS) for name in _IMAGENET},
    "voc-deeplab": _run("deeplab", "coco_voc", _LARGE, "mask_ap,pointing,energy,box_ap", 40),
    "checks-deeplab": _run("deeplab", "coco_voc", _CHECKED, f"{_BOXES},sensitivity,random_logit", 20),
    **{f"grids-{name}": _run(name, "imagenet_single400", _LARGE, "grid,grid_ap") for name in _IMAGENET},
    **{f"checks-{name}": _run(name, "imagenet_val400", _CHECKED, _CHECKS, 20) for name in _IMAGENET},
    "checks-scenes": _run("bundled", "", _CHECKED, _CHECKS, 40),
    "slow-scenes": _run("bundled", "", _SLOW, _MASKS, 40),
    **{f"slow-{name}": _run(name, "imagenet_val400", _SLOW, _CLEAR, 20) for name in _IMAGENET},
    "cost": _run("mobilenet", "imagenet_val400", f"{_ALL},smoothgrad,integrated-gradients", "speed,memory", 8),
}


def main() -> None:
    """Run the named runs, or all, and put their tables into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with weights/, data/ and tools/")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs, one folder each")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)}")
    args = parser.parse_args()
    for name in args.names or RUNS:
        options = [word.replace("$SHARED", str(args.shared)) for word in shlex.split(RUNS[name])]
        command = [sys.executable, "-m", "tsgb", "bench", *options, "--out", str(args.out / name)]
        made = args.out / name / "results.md"
        made.unlink(missing_ok=True)
        subprocess.run(command, stdout=subprocess.DEVNULL)  # 1 where an image or a method failed, which the table says
        if not made.exists():
            raise SystemExit(f"{name} did not end: {shlex.join(command)}")
        table = made.read_text().partition("## Protocol")[0].replace(str(args.shared), "$SHARED")
        table = re.sub("^## ", "#### ", table, flags=re.MULTILINE)  # below the page's own headings
        PAGE.write_text(filled(PAGE.read_text(), name, f"```\ntsgb bench {RUNS[name]}\n```\n\n{table}"))
    PAGE.write_text(filled(PAGE.read_text(), "protocol", protocol()))


def protocol() -> str:
    """Every figure and method with all parameters, as the results of each run have them too."""
    figures = [f"- **{figure.title}**: {figure.text}." for figure in FIGURES.values()]
    rivals = [f"- **{method.title}** (`{name}`): {method.source}." for name, method in METHODS.items()]
    return "\n".join(["### Figures", "", *figures, "", "### Methods", "", *rivals])


def filled(page: str, name: str, text: str) -> str:
    """Put a text between a name's marks on the page."""
    pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"the page has no place for {name}: write <!-- {name} --> and <!-- end --> there")
    return pattern.sub(lambda found: f"{found[1]}{text.strip()}\n\n{found[2]}", page)


if __name__ == "__main__":
    main()
