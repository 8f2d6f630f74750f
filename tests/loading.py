"""What the tests of models, factories and states share: files to load from, and what becomes of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import tsgb
from tsgb.models import ModelError, load


def saved(model, path):
    (safetensors.torch.save_file if path.suffix == ".safetensors" else torch.save)(model.state_dict(), path)
    return path


def printed(program, *folders):
    """What a fresh Python prints that finds modules in these folders first, and the tsgb under test."""
    path = os.pathsep.join(map(str, [*folders, Path(tsgb.__file__).parents[1]]))
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def refused(*arguments, **options):
    with pytest.raises(ModelError) as caught:
        load(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def written(folder, text, name="nets.py"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def same(model, other):
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
