"""What is installed is what is in the repository: the wheel has the weights, the types and the command."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_wheel_works_alone(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    source = tmp_path / "source"
    source.mkdir()
    for name in ("src", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    subprocess.run([*command, "--wheel-dir", tmp_path, source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("tsgb-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    assert {"tsgb/py.typed", "tsgb/weights/bundled.safetensors", "tsgb/weights/bundled-vgg.safetensors"} <= set(names)
    assert {name.split("/")[0] for name in names} == {"tsgb", "tsgb-0.1.0.dist-info"}
    code = "import tsgb; print(tsgb.__file__); print(tsgb.load('bundled').names[1])"
    environment = {"PYTHONPATH": str(tmp_path / "installed"), "PATH": ""}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [str(tmp_path / "installed" / "tsgb" / "__init__.py"), "star"]


def test_the_bundled_weights_have_their_record():
    folder = ROOT / "src" / "tsgb" / "weights"
    for name in ("bundled", "bundled-vgg"):
        record = json.loads((folder / f"{name}.json").read_text())
        accuracy = {row["objects"]: row[f"all_in_top_{row['objects']}"] for row in record["held_out"]}
        assert accuracy[1] >= 0.97
        assert accuracy[2] >= 0.95
        assert (folder / f"{name}.safetensors").stat().st_size <= 2 * 1024**2


def test_the_version_is_the_same_everywhere():
    import tsgb

    assert f"version: {tsgb.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {tsgb.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_readme_begins_with_code():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert next(n for n, line in enumerate(lines, 1) if line.startswith("```")) < 20


def test_the_readmes_example_runs():
    blocks = (ROOT / "README.md").read_text().split("```python\n")[1:]
    (example,) = (block.split("```")[0] for block in blocks if block.startswith("import torch"))
    names: dict = {}
    exec(example, names)
    assert names["e"].maps.shape == (2, 2, 128, 128)
