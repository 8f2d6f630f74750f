"""How models come to `tsgb.explain`: each row of docs/callers.md is a test here."""

import os
import socket
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import tsgb
from helpers import relative
from tsgb import vision


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3),
            nn.ReLU6(),
            nn.Dropout(0.5),
        )
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)
        self.eval()

    def forward(self, x):
        x = self.body(x)
        x = self.pool(x + torch.tanh(x))
        return self.head(torch.flatten(x, 1))


class Output(OrderedDict):
    """Like a ModelOutput of transformers: a dict with attributes."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class LikeTransformers(Net):
    def forward(self, pixel_values, labels=None, return_dict=True):
        return Output(logits=super().forward(pixel_values), hidden_states=(pixel_values,))


@pytest.fixture
def x():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def same(x):
    """Checks that a model is explained as `Net` is."""
    expected = tsgb.explain(Net(), x, [[1, 2], [0, 4]])

    def check(model):
        found = tsgb.explain(model, x, [[1, 2], [0, 4]])
        assert relative(found.maps, expected.maps) < 1e-5
        assert torch.allclose(found.logits, expected.logits, atol=1e-6)
        assert not [row for row in found.coverage if row[1] is None]
        return found

    return check


@pytest.fixture
def group():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_data_parallel(same):
    same(nn.DataParallel(Net()))


def test_distributed_data_parallel(same, group):
    same(nn.parallel.DistributedDataParallel(Net()).eval())


@pytest.mark.parametrize("how", ["wrapped", "in place", "a part"])
def test_torch_compile(how, same):
    model = Net()
    if how == "wrapped":
        model = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    else:
        model.body = torch.compile(model.body, backend="eager")
    same(model)


def test_compiled_models_in_threads_leave_the_compiler_as_it_was(x):
    model, calls = torch.compile(Net(), backend=lambda graph, inputs: calls.append(1) or graph), []
    expected = tsgb.explain(Net(), x, 1).maps
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: tsgb.explain(model, x, 1).maps, range(16)):
            assert relative(found, expected) < 1e-6
    assert not calls  # none was compiled for an explanation
    with torch.no_grad():
        model(x)
    assert calls


def test_fx(same):
    same(torch.fx.symbolic_trace(Net()))


def test_export(same, x):
    same(torch.export.export(Net(), (x,)).module())


@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript(how, same, x):
    same(torch.jit.script(Net()) if how == "script" else torch.jit.trace(Net(), x))


def test_outputs_of_transformers(same):
    same(LikeTransformers())


def test_lightning_in_its_own_loops(x, tmp_path):
    vision.import_torchvision()  # which torchmetrics imports, and lightning that
    import pytorch_lightning as lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.found = Net(), []

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch):
            return functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch):
            self.found.append(tsgb.explain(self, batch[0], batch[1]).maps)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    module, targets = Module(), torch.tensor([1, 2])
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, targets), batch_size=2)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", devices=1, default_root_dir=tmp_path, **quiet)
    trainer.fit(module, batches, batches)
    expected = tsgb.explain(module.net.eval(), x, targets).maps
    assert relative(tsgb.explain(module.eval(), x, targets).maps, expected) < 1e-6
    trainer.validate(module, batches, verbose=False)
    assert relative(module.found[-1], expected) < 1e-5
    assert len(module.found) > 3
    assert relative(module.found[0], expected) > 1e-3  # before training


def test_a_functional_call(same):
    model = Net()
    same(lambda images: functional_call(model, dict(model.named_parameters()), (images,)))


def test_a_callable_that_cannot_be_hashed(same):
    @dataclass
    class Wrapped:
        model: nn.Module

        def __call__(self, images):
            return self.model(images)

    same(Wrapped(Net()))


def test_parametrised_weights(same):
    model = Net()
    nn.utils.parametrizations.weight_norm(model.body[4])
    nn.utils.parametrizations.weight_norm(model.head)
    same(model)


def test_channels_last(same):
    same(Net().to(memory_format=torch.channels_last))


def test_images_of_a_graph(x):
    leaf = x.clone().requires_grad_()
    computed = leaf * 1
    assert torch.equal(tsgb.explain(Net(), computed, 1).maps, tsgb.explain(Net(), x, 1).maps)
    computed.sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(x))


def test_inside_a_training_loop(x):
    def trained(explains):
        model = Net().train()
        optimiser = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(3):
            torch.manual_seed(step)
            loss = functional.cross_entropy(model(x), torch.tensor([1, 3]))
            if explains:  # between forward and backward
                maps = tsgb.explain(model.eval(), x, 1).maps
                assert not maps.requires_grad
                model.train()
            loss.backward()
            if explains:  # and between backward and step
                tsgb.explain(model.eval(), x, 1)
                model.train()
            optimiser.step()
            optimiser.zero_grad()
        return model.state_dict()

    alone, explained = trained(False), trained(True)
    assert all(torch.equal(alone[key], explained[key]) for key in alone)


def test_weights_on_another_device_are_named(x):
    with pytest.raises(ValueError, match=r"images must be on the model's device meta.*images.to\('meta'\)"):
        tsgb.explain(Net().to("meta"), x, 1)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_on_an_accelerator(device, x):
    if not getattr(torch, device).is_available():
        pytest.skip(f"no {device} device at hand")
    expected = tsgb.explain(Net(), x, [[1, 2], [0, 4]])
    found = tsgb.explain(Net().to(device), x.to(device), [[1, 2], [0, 4]])
    assert found.maps.device.type == device
    assert relative(found.maps.cpu(), expected.maps) < 1e-3


def test_parts_on_two_devices(x):
    if torch.cuda.device_count() < 2:
        pytest.skip("fewer than two CUDA devices at hand")

    class Split(Net):
        def forward(self, x):
            return self.head(self.pool(self.body(x).to("cuda:1")).flatten(1))

    alone, model = Split(), Split()
    model.body.to("cuda:0")
    model.head.to("cuda:1")
    expected = tsgb.explain(alone.to("cuda:1"), x.to("cuda:1"), 1).maps
    assert relative(tsgb.explain(model, x.to("cuda:0"), 1).maps.cpu(), expected.cpu()) < 1e-3


def test_hooks_on_gradients_are_not_called(x):
    """As what flows backward is no gradient."""

    class Hooked(Net):
        def forward(self, x):
            x = self.body(x)
            x.register_hook(seen.append)
            x.retain_grad()
            return self.head(torch.flatten(self.pool(x + torch.tanh(x)), 1))

    seen = []
    assert torch.equal(tsgb.explain(Hooked(), x, 1).maps, tsgb.explain(Net(), x, 1).maps)
    assert not seen
    Hooked()(x)[:, 1].sum().backward()
    assert len(seen) == 1, "they are the model's own afterwards"


def test_checkpointing(same):
    class Checkpointed(Net):
        def forward(self, x):
            x = checkpoint(self.body, x, use_reentrant=False)
            return self.head(torch.flatten(self.pool(x + torch.tanh(x)), 1))

    same(Checkpointed())


def test_a_model_that_runs_without_gradients(same):
    same(torch.no_grad()(Net()))
    same(torch.inference_mode()(Net()))


def test_inside_a_counter_of_operations(x):
    from torch.utils.flop_counter import FlopCounterMode

    expected = tsgb.explain(Net(), x, 1).maps
    with FlopCounterMode(display=False):
        try:
            found = tsgb.explain(Net(), x, 1)
        except (RuntimeError, TypeError) as error:
            assert "\n" not in str(error).strip()  # noqa: PT017
            return
    assert relative(found.maps, expected) < 1e-5


def test_a_callable_with_attributes_of_a_modules_name(x):
    class Wrapper:
        modules, parameters = [Net()], {}

        def __call__(self, x):
            return self.modules[0](x)

    assert torch.equal(tsgb.explain(Wrapper(), x, 1).maps, tsgb.explain(Net(), x, 1).maps)
    with pytest.raises(RuntimeError, match="channels"):
        tsgb.explain(Wrapper(), x[:, :2], 1)
