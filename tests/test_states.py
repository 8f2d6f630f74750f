import pickle

import pytest
import torch
from torch import nn

from helpers import same, saved
from tsgb.states import ModelError, fill, filled, read, sha256


def net(classes=2):
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, classes))


def fault(action, *arguments):
    with pytest.raises(ModelError) as caught:
        action(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# reading and filling


@pytest.mark.parametrize("form", ["plain", "state_dict", "model", "module", "both", "safetensors"])
def test_weights_file_in_every_form(tmp_path, form):
    model = net()
    state = model.state_dict()
    wrapped = {f"module.{key}": value for key, value in state.items()}
    content = {
        "plain": state,
        "state_dict": {"state_dict": state, "epoch": 3},
        "model": {"model": state, "optimizer": {"lr": 0.1}},
        "module": wrapped,
        "both": {"state_dict": wrapped},
    }
    if form == "safetensors":
        file = saved(model, tmp_path / "net.safetensors")
    else:
        file = tmp_path / "net.pth"
        torch.save(content[form], file)
    empty = net()
    assert not same(empty, model)
    fill(empty, read(file), "net")
    assert same(empty, model)


def test_number_of_classes_is_the_files(tmp_path):
    model = net(7)
    found = filled(lambda num_classes=2: net(num_classes), read(saved(model, tmp_path / "seven.pth")), "net")
    assert same(found, model)


def test_half_precision_weights_make_a_float32_module(tmp_path):
    model, half = net(), net().half()
    fill(model, read(saved(half, tmp_path / "half.pth")), "net")
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert torch.equal(model[0].weight, half[0].weight.float())


# weights files that cannot be used


class Sneaky:
    def __reduce__(self):
        return (print, ("the file ran code",))


def truncated(path):
    torch.save(nn.Conv2d(3, 8, 3).state_dict(), path)
    path.write_bytes(path.read_bytes()[:-200])


def scripted(path):
    torch.jit.save(torch.jit.trace(nn.ReLU(), torch.zeros(1)), path)


@pytest.mark.filterwarnings("ignore:.*TorchScript")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("none.pth", lambda path: None, "does not exist"),
        ("folder", lambda path: path.mkdir(), "is no regular file"),
        ("empty.pth", lambda path: path.write_bytes(b""), "is empty"),
        ("page.pth", lambda path: path.write_text("<html>not found</html>"), "is damaged or of another kind"),
        ("text.pth", lambda path: path.write_text("class Net:\n    pass\n"), "is damaged or of another kind"),
        ("cut.pth", truncated, "is damaged or of another kind"),
        ("cut.safetensors", lambda path: path.write_bytes(b"\x10" * 40), "is damaged or of another kind"),
        ("whole.pth", lambda path: torch.save(nn.ReLU(), path), "holds more than tensors"),
        ("sneaky.pth", lambda path: torch.save({"a": Sneaky()}, path), "holds more than tensors"),
        (
            "pickle.pth",
            lambda path: path.write_bytes(pickle.dumps(Sneaky(), protocol=2)),
            "holds more than tensors",
        ),
        ("script.pt", scripted, "holds more than tensors"),
        ("tensor.pth", lambda path: torch.save(torch.ones(2), path), "holds no state dict but a Tensor"),
        ("other.pth", lambda path: torch.save({"net": {"a": torch.ones(1)}}, path), "but a dict of net"),
        ("bare.pth", lambda path: torch.save({}, path), "holds no state dict"),
        ("numbers.pth", lambda path: torch.save({0: torch.ones(1)}, path), "holds no state dict but a dict of 0"),
    ],
)
def test_unusable_weights_file(tmp_path, capfd, name, make, reason):
    make(tmp_path / name)
    message = fault(read, tmp_path / name)
    assert message.startswith(f"weights file {tmp_path / name}")
    assert reason in message
    assert "the file ran code" not in capfd.readouterr().out
    if "more than tensors" in reason:
        assert "can run code" in message
        assert "torch.save(" in message


def test_misfit_names_the_first_keys_and_both_shapes(tmp_path):
    state = net().state_dict()
    state["0.weight"] = torch.zeros(4, 3, 5, 5)
    for key in ("1.weight", "1.bias", "1.running_mean", "1.running_var"):
        state[f"new.{key}"] = state.pop(key)
    torch.save(state, tmp_path / "odd.pth")
    assert fault(fill, net(), read(tmp_path / "odd.pth"), "tiny") == (
        "odd.pth does not fit tiny; missing: 1.weight, 1.bias, 1.running_mean and 1 more; "
        "unexpected: new.1.weight, new.1.bias, new.1.running_mean and 1 more; "
        "of another shape: 0.weight is (4, 3, 5, 5), not (4, 3, 3, 3)"
    )


# sha256


def test_sha256_of_a_state_dict_depends_on_names_types_shapes_and_bytes_only():
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3, dtype=torch.int64)}
    turned = state["a"].T.contiguous().T
    assert turned.stride() != state["a"].stride()
    assert sha256({"b": state["b"], "a": turned}) == sha256(state)
    others = [
        {**state, "a": state["a"].reshape(3, 2)},
        {**state, "a": state["a"].view(torch.int32)},
        {**state, "a": state["a"] + 1},
        {"a": state["a"], "c": state["b"]},
        {"a": state["a"]},
    ]
    assert len({sha256(other) for other in [state, *others]}) == 6


def test_sha256_of_unusual_tensors():
    state = {
        "half": torch.ones(2, dtype=torch.bfloat16, requires_grad=True),
        "none": torch.zeros(0, 3),
        "truth": torch.tensor([True, False]),
        "note": {"no": "tensor"},
    }
    assert sha256(state) == sha256({key: state[key].detach().clone() for key in ("half", "none", "truth")})
