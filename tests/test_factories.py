import concurrent.futures
import inspect
import pickle
import sys

import pytest
import torch
from torch import nn

from helpers import printed, refused, same, saved, written
from tsgb.models import load, sha256
from tsgb.preprocessing import IMAGENET_MEAN, IMAGENET_STD


def test_factory_gives_module_and_preprocessing(tmp_path):
    file = written(
        tmp_path,
        "import torch\n"
        "def net():\n"
        "    meta = {'size': (48, 32), 'mean': (0, 0, 0), 'std': [1, 1, 1], 'resize': 'crop'}\n"
        "    meta['names'] = ['cat', 'dog']\n"
        "    return torch.nn.Conv2d(3, 2, 1, dtype=torch.float64).train(), meta\n",
    )
    network = load(f"{file}:net")
    assert not network.model.training
    assert network.model.weight.dtype == torch.float64
    assert network.preprocessing.size == (48, 32)
    assert (network.preprocessing.mean, network.preprocessing.std) == ((0, 0, 0), (1, 1, 1))
    assert network.preprocessing.resize == "crop"
    assert network.names == ("cat", "dog")
    assert network.weights == "state dict of the factory"
    assert network.weights_sha256 == sha256(network.model.state_dict())


def test_factory_gives_a_module_alone_and_weights_fill_it(tmp_path):
    file = written(tmp_path, "import torch\ndef net(): return torch.nn.Conv2d(3, 2, 1)\n")
    network = load(f"{file}:net")
    assert network.preprocessing.size == (224, 224)
    assert (network.preprocessing.mean, network.preprocessing.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert network.preprocessing.resize == "squash"
    assert network.names is None

    model = nn.Conv2d(3, 2, 1)
    network = load(f"{file}:net", saved(model, tmp_path / "net.pth"))
    assert same(network.model, model)
    assert (network.weights, network.weights_sha256) == ("net.pth", sha256(tmp_path / "net.pth"))
    assert "weight is (9, 3, 1, 1), not (2, 3, 1, 1)" in refused(
        f"{file}:net", saved(nn.Conv2d(3, 9, 1), tmp_path / "nine.pth")
    )


@pytest.mark.parametrize(
    "how", ["from parts import Part", "from .parts import Part", "import parts; Part = parts.Part"]
)
@pytest.mark.parametrize("when", ["import", "call"])
def test_factory_file_may_import_its_neighbours(tmp_path, monkeypatch, how, when):
    monkeypatch.chdir(tmp_path)
    for width in (4, 5):  # two folders with a helper of the same name
        folder = tmp_path / str(width)
        written(folder, f"import torch\nclass Part(torch.nn.Conv2d):\n    width = {width}\n", "parts.py")
        head, body = (how, "pass") if when == "import" else ("", how)
        written(folder, f"{head}\ndef net():\n    {body}\n    return Part(3, Part.width, 1)\n")
    path = list(sys.path)
    for width in (4, 5, 4):
        assert load(f"{width}/nets.py:net").model.out_channels == width
        assert sys.path == path


def test_each_load_reads_the_factory_file_anew(tmp_path):
    file = written(tmp_path, "import torch\ndef net(): return torch.nn.Conv2d(3, 4, 1)\n")
    first = load(f"{file}:net")
    file.write_text("import torch\nprint\ndef net(): return torch.nn.Conv2d(3, 15, 1)\n")
    assert (first.model.out_channels, load(f"{file}:net").model.out_channels) == (4, 15)


def test_factory_file_leaves_sys_path_and_others_modules_alone(tmp_path):
    written(tmp_path, "mine = True\n", "colorsys.py")  # the name of a module of Python's own
    import colorsys

    file = written(
        tmp_path, "import sys, torch\nsys.path.append('here')\nclass Net(torch.nn.ReLU): pass\nprint = 1 / 0\n"
    )
    path, before = list(sys.path), set(sys.modules)
    refused(f"{file}:Net")
    assert sys.path == path
    assert set(sys.modules) == before
    assert sys.modules["colorsys"] is colorsys


def test_what_a_factory_file_imports_from_elsewhere_is_kept(tmp_path):
    file = written(tmp_path, "import torch, wsgiref, part\nNet = torch.nn.ReLU\ndef net(): return Net()\n")
    written(tmp_path, "", "part.py")
    (tmp_path / "wsgiref").mkdir()  # a mere folder, named as a package of Python's own
    program = f"""
import sys
from tsgb import models
models.load({str(file)!r} + ":net")
first = sys.modules["wsgiref"], sys.modules["part"]
models.load({str(file)!r} + ":net")
print(first[0] is sys.modules["wsgiref"], first[1] is sys.modules["part"])
"""
    assert printed(program) == "True False"


def test_factory_module_can_be_pickled_and_inspected(tmp_path):
    text = "from __future__ import annotations\nimport dataclasses, torch\n"
    text += "@dataclasses.dataclass\nclass Plan:\n    width: int = 4\n"
    file = written(tmp_path, text + "class Net(torch.nn.ReLU): pass\n")
    model = load(f"{file}:Net").model
    assert type(pickle.loads(pickle.dumps(model))) is type(model)
    assert inspect.getsource(type(model)) == "class Net(torch.nn.ReLU): pass\n"


def test_a_factory_may_load(tmp_path):
    file = written(tmp_path, "from tsgb import models\ndef net(): return models.load('bundled').model\n")
    assert same(load(f"{file}:net").model, load("bundled").model)


def test_threads_may_load_factories_at_once(tmp_path):
    for width in range(1, 9):
        folder = tmp_path / str(width)
        written(folder, f"width = {width}\n", "part.py")
        written(
            folder,
            "import torch, time\ntime.sleep(0.01)\nimport part\ndef net(): return torch.nn.Conv2d(3, part.width, 1)\n",
        )
    path = list(sys.path)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda width: load(f"{tmp_path / str(width)}/nets.py:net").model.out_channels, range(1, 9))
        assert list(found) == list(range(1, 9))
    assert sys.path == path


@pytest.mark.parametrize(
    ("text", "factory", "reason"),
    [
        ("1 / 0\n", "net", "cannot be imported: ZeroDivisionError: division by zero (line 1)"),
        ("\ndef net(:\n", "net", "cannot be imported: SyntaxError: "),
        ("import no_such_module\n", "net", "No module named 'no_such_module' (line 1)"),
        ("raise SystemExit(3)\n", "net", "cannot be imported: SystemExit: 3 (line 1)"),
        ("def tiny_net(): pass\ndef _tiny_ne(): pass\n", "tiny_nett", "no function tiny_nett; it has tiny_net"),
        ("", "net", "has no function net; it has none"),
        ("net = 3\n", "net", "has no function net"),
        ("import torch\nnet = torch.nn.ReLU()\n", "net", "has no function net"),
        ("def net():\n    raise KeyError('a\\nb')\n", "net", ":net raised KeyError: 'a\\nb' (line 2)"),
        ("def net(width): pass\n", "net", ":net raised TypeError: net() missing 1 required positional argument"),
        ("def net(): exit(1)\n", "net", ":net raised SystemExit: 1 (line 1)"),
        ("import torch\ndef net(): return torch.nn.LazyLinear(2)\n", "net", ":net cannot be read ("),
        ("def net(): return 3\n", "net", "must return a torch.nn.Module or (module, dict), got a int"),
        (
            "import torch\ndef net(): return torch.nn.ReLU(), 3\n",
            "net",
            "must return a torch.nn.Module or (module, dict)",
        ),
        (
            "import torch\ndef net(): return torch.nn.ReLU(), {'sizes': 3}\n",
            "net",
            "unknown key 'sizes'; it may give size",
        ),
        ("import torch\ndef net(): return torch.nn.ReLU(), {'mean': (0, 0)}\n", "net", ":net: preprocessing: "),
        ("import torch\ndef net(): return torch.nn.ReLU(), {'size': 'big'}\n", "net", ":net: preprocessing: "),
        ("import torch\ndef net(): return torch.nn.ReLU(), {'resize': 'fit'}\n", "net", ":net: preprocessing: "),
        ("import torch\ndef net(): return torch.nn.ReLU(), {'names': 'cat'}\n", "net", "names as a list of strings"),
        ("import torch\ndef net(): return torch.nn.ReLU(), {'names': [1, 2]}\n", "net", "names as a list of strings"),
    ],
)
def test_unusable_factory(tmp_path, text, factory, reason):
    file = written(tmp_path, text)
    message = refused(f"{file}:{factory}")
    assert str(file) in message
    assert reason in message
    assert "_tiny_ne" not in message


def test_unusable_factory_specification(tmp_path):
    assert refused(f"{tmp_path}/nets.py") == f"{tmp_path}/nets.py names no function: expected path/file.py:factory"
    assert "names no function" in refused(f"{tmp_path}/nets.py:")
    assert refused(f"{tmp_path}/nets.py:net") == f"{tmp_path}/nets.py does not exist"
    (tmp_path / "nets.py").mkdir()
    assert "is no regular file" in refused(f"{tmp_path}/nets.py:net")
