"""The arrows between the files go one way, and importing the package is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "tsgb"

# Who may import whom, directly.
ARROWS = {
    "fusion": set(),
    "rules": {"fusion"},
    "engine": {"rules"},
    "targets": {"engine"},
    "checks": {"rules", "targets", "engine"},
    "explanation": {"plots", "render", "images", "preprocessing", "regions"},
    "passes": {"rules", "engine", "fusion", "targets", "checks", "explanation"},
    "attribution": {"rules", "engine", "targets", "checks", "explanation", "passes"},
    "compiled": {"rules", "engine", "targets", "checks", "explanation", "passes", "attribution"},
    "doctor": {"rules", "attribution", "explanation"},
    "images": set(),
    "preprocessing": set(),
    "render": set(),
    "plots": {"render"},
    "scenes": set(),
    "networks": {"scenes"},
    "states": set(),
    "factories": {"states"},
    "vision": {"states", "factories"},
    "models": {"preprocessing", "networks", "states", "factories", "vision"},
    "report": {"attribution", "engine", "explanation", "models", "images", "render", "rules", "targets"},
    "regions": set(),
    "metrics": {"regions", "vision"},
    "methods": {"rules", "engine", "passes", "attribution", "checks", "targets", "vision"},
    "data": {"images", "scenes"},
    "categories": {"data"},
    "bench": {
        "methods",
        "metrics",
        "data",
        "categories",
        "models",
        "preprocessing",
        "images",
        "render",
        "report",
        "targets",
    },
    "cli": {"report", "doctor", "bench", "models", "images", "render", "scenes"},
}
TORCH_ONLY = ("fusion", "rules", "engine", "targets", "checks", "passes", "attribution", "compiled")
LATE = ("explanation", "cli")  # what they import of the package, they import when called


def files(name):
    folder = SOURCE / name
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [SOURCE / f"{name}.py"]


def imports(path):
    """(top-level package, file of ours or None, whether at the top) for each import of a file."""
    tree = ast.parse(path.read_text())
    at_top = {
        id(node) for statement in tree.body for node in ([statement] if not isinstance(statement, ast.If) else [])
    }
    depth = len(path.relative_to(SOURCE).parts) - 1
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                yield parts[0], parts[1] if parts[0] == "tsgb" and len(parts) > 1 else None, id(node) in at_top
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".")
            if node.level == depth + 1:
                names = [parts[0]] if parts[0] else [alias.name for alias in node.names]
                yield from (("tsgb", name, id(node) in at_top) for name in names)
            elif node.level == 0:
                inner = (parts[1:2] or [alias.name for alias in node.names]) if parts[0] == "tsgb" else [None]
                yield from ((parts[0], name, id(node) in at_top) for name in inner)


def test_every_file_has_its_place():
    found = {path.stem if path.is_file() else path.name for path in SOURCE.iterdir()}
    assert found - {"__init__", "__main__", "__pycache__", "py.typed", "py", "weights", "classes"} == set(ARROWS)


@pytest.mark.parametrize("name", ARROWS)
def test_arrows_go_one_way(name):
    ours = {inner for path in files(name) for package, inner, _ in imports(path) if package == "tsgb" and inner}
    assert ours - {"__version__"} <= ARROWS[name]


def neighbours(path):
    """The files of its own package that a file imports, but for types alone."""
    tree = ast.parse(path.read_text())
    for_types = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    skipped = {id(inner) for node in for_types for inner in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in skipped:
            folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            whole = [folder.with_suffix(".py"), folder / "__init__.py"]
            found |= {*whole, *(folder / f"{alias.name}.py" for alias in node.names)}
    return {file for file in found if file.exists()} - {path}


@pytest.mark.parametrize("name", [name for name in ARROWS if (SOURCE / name).is_dir()])
def test_no_circle_within_a_package(name):
    own = set(files(name))
    arrows = {path: neighbours(path) & own for path in own}
    arrows.pop(SOURCE / name / "__init__.py", None)
    while ground := {path for path, below in arrows.items() if not below & arrows.keys()}:
        arrows = {path: below for path, below in arrows.items() if path not in ground}
    assert sorted(str(path.relative_to(SOURCE)) for path in arrows) == []


@pytest.mark.parametrize("name", TORCH_ONLY)
def test_the_method_needs_torch_alone(name):
    packages = {package for path in files(name) for package, _, _ in imports(path)}
    assert packages - set(sys.stdlib_module_names) <= {"torch", "tsgb"}


@pytest.mark.parametrize("name", LATE)
def test_drawing_is_imported_when_asked_for(name):
    early = {inner for path in files(name) for package, inner, top in imports(path) if package == "tsgb" and top}
    assert early <= {"__version__"}


def test_importing_loads_torch_numpy_and_pillow_alone():
    code = (
        "import torch, numpy, PIL.Image, sys; before = set(sys.modules); import tsgb; print(*set(sys.modules) - before)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    packages = {name.split(".")[0] for name in loaded} - set(sys.stdlib_module_names)
    assert {name for name in packages if not name.startswith("_")} <= {"tsgb", "PIL", "numpy", "torch"}
