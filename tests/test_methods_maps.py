"""The maps of each method against a twin: written out, or the formula of its paper."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import reference
import reference_metrics
from tsgb.methods import attribute
from tsgb.methods import maps as shared_maps
from tsgb.methods.activations import prepared
from tsgb.methods.gradients import deeplift
from tsgb.methods.perturbation import rise


class Net(nn.Module):
    """Two strided convolutions, a linear head on their mean: features of 3 x 3 below features of 6 x 6."""

    def __init__(self, act=nn.ReLU, bias=False, signed=True):
        super().__init__()
        self.conv1, self.act1 = nn.Conv2d(3, 4, 3, 2, 1, bias=bias), act()
        self.conv2, self.act2 = nn.Conv2d(4, 6, 3, 2, 1, bias=bias), act()
        self.head = nn.Linear(6, 3, bias=bias)
        with torch.random.fork_rng():
            torch.manual_seed(11)
            for parameter in self.parameters():
                parameter.data = torch.randn_like(parameter) if signed else torch.rand_like(parameter)
        self.double().eval()

    def first(self, x):
        return self.act1(self.conv1(x))

    def second(self, x):
        return self.act2(self.conv2(x))

    def forward(self, x):
        return self.head(self.second(self.first(x)).mean((2, 3)))


@pytest.fixture
def image():
    return torch.rand(1, 3, 12, 12, dtype=torch.float64)


def of(name, model, image, k=1, seed=0):
    return attribute(name, model, image, torch.tensor([[k]]), seed)[0, 0].double()


def close(ours, expected, tolerance=1e-5):
    return torch.allclose(ours, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


# ---- what they share


@pytest.mark.parametrize("sigma", [0.3, 0.9, 2.0])
def test_blur_is_its_twin(sigma):
    map = torch.rand(7, 5, dtype=torch.float64)
    assert torch.allclose(shared_maps.gaussian_blur(map, sigma), reference_metrics.blur(map, sigma), rtol=1e-10)
    stack = torch.stack([map, 2 * map])
    assert torch.allclose(shared_maps.gaussian_blur(stack, sigma)[1], 2 * shared_maps.gaussian_blur(map, sigma))


def test_enlarging_is_its_twin():
    map = torch.rand(3, 4, dtype=torch.float64)
    assert torch.allclose(
        shared_maps.upsampled(map[None], (7, 8))[0], reference_metrics.bilinear(map, 7, 8), rtol=1e-12
    )


def gradients(model, image, k=1):
    leaf = image.clone().requires_grad_()
    return torch.autograd.grad(model(leaf)[0, k], leaf)[0][0]


def test_gradient_and_image_times_gradient(image):
    model = Net()
    grad = gradients(model, image)
    strongest = torch.tensor(
        [[max(abs(float(grad[c, y, x])) for c in range(3)) for x in range(12)] for y in range(12)], dtype=torch.float64
    )
    assert close(of("gradient", model, image), reference_metrics.blur(strongest, 0.02 * 12))
    assert close(of("inputxgradient", model, image), (grad * image[0]).sum(0))


def test_smoothgrad_averages_gradients_before_it_takes_their_size(image):
    model = Net()
    expected = torch.zeros(3, 12, 12, dtype=torch.float64)
    torch.manual_seed(4)
    sigma = 0.15 * float(image.max() - image.min())
    for _ in range(5):
        noise = torch.normal(0, torch.full((5, 3, 12, 12), sigma, dtype=torch.float32))
        for n in range(5):
            expected += gradients(model, image + noise[n]) / 25
    assert close(of("smoothgrad", model, image, seed=4), expected.abs().amax(0))


def test_integrated_gradients_sum_to_the_rise_of_the_logit(image):
    model = Net(bias=True)
    total = model(image)[0, 1] - model(torch.zeros_like(image))[0, 1]
    assert float(of("integrated-gradients", model, image).sum()) == pytest.approx(float(total.detach()), rel=0.02)


# ---- class activation maps


def test_gradcam_and_layercam_are_their_twins(image):
    model = Net()
    features = model.second(model.first(image)).detach()[0]
    with_gradcam, with_layercam = torch.zeros(2, 3, 3, dtype=torch.float64)
    grad = (model.head.weight.detach()[1] / 9)[:, None, None].expand(6, 3, 3)
    for y in range(3):
        for x in range(3):
            for c in range(6):
                mean = sum(float(grad[c, i, j]) for i in range(3) for j in range(3)) / 9
                with_gradcam[y, x] += mean * float(features[c, y, x])
                with_layercam[y, x] += max(float(grad[c, y, x]), 0.0) * float(features[c, y, x])
    assert close(of("gradcam", model, image), reference_metrics.bilinear(with_gradcam.clamp(min=0), 12, 12))
    assert close(of("layercam", model, image), reference_metrics.bilinear(with_layercam.clamp(min=0), 12, 12))


def test_guided_gradcam_is_their_product(image):
    from captum.attr import GuidedBackprop

    model = Net()
    guided = GuidedBackprop(model).attribute(image.clone().requires_grad_(), 1)[0].abs().amax(0)
    assert close(of("guided-gradcam", model, image), guided.detach() * of("gradcam", model, image))
    assert close(of("guided", model, image), reference_metrics.blur(guided.detach(), 0.02 * 12))


# ---- excitation backprop


def excited(model, image, k, sign):
    """Probability at the features of 6 x 6, from the head's weights times the sign."""
    low = model.first(image).detach()
    high = model.second(low).detach()
    pooled = high.mean((2, 3))[0]
    seed = torch.zeros(3, dtype=torch.float64)
    seed[k] = 1
    on_pooled = reference.excitation_of_vector(seed, pooled, sign * model.head.weight.detach())
    share = torch.where(pooled == 0, 0, on_pooled / torch.where(pooled == 0, 1, pooled) / 9)
    return reference.excitation_by_loops(share[None, :, None, None] * high, low, model.conv2.weight.detach(), 2, 1).sum(
        1
    )[0]


def test_excitation_backprop_is_its_twin(image):
    model = Net()
    winner, dual = excited(model, image, 1, 1), excited(model, image, 1, -1)
    assert float(winner.sum()) == pytest.approx(1)
    assert close(of("ebp", model, image), reference_metrics.bilinear(winner, 12, 12))
    assert (winner < dual).any()
    assert close(of("cebp", model, image), reference_metrics.bilinear(winner - dual, 12, 12).clamp(min=0))


# ---- DeepLift, LRP


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6, lambda: nn.Hardtanh(-0.5, 0.7), nn.LeakyReLU])
def test_deeplift_sums_to_the_difference_of_the_logit(act, image):
    model = Net(act, bias=True)
    model.conv1.weight.data *= 5
    total = model(image)[0, 1] - model(torch.zeros_like(image))[0, 1]
    assert float(of("deeplift", model, image).sum()) == pytest.approx(float(total.detach()), rel=1e-5)


def test_deeplift_is_the_rescale_rule_written_out(image):
    """Multipliers are differences of outputs over differences of inputs, times the weights, from the logit down."""
    model = Net(nn.ReLU6, bias=True)
    model.conv1.weight.data *= 5
    values = {}
    for name, x in (("image", image), ("zero", torch.zeros_like(image))):
        a = model.conv1(x)
        b = model.conv2(model.act1(a))
        values[name] = (a.detach(), b.detach())
    assert (values["image"][0] > 6).any()
    multiplier = (model.head.weight.detach()[1] / 9)[None, :, None, None].expand(1, 6, 3, 3)
    for layer, size in ((1, 6), (0, 12)):
        before, reference = values["image"][layer], values["zero"][layer]
        multiplier = multiplier * (before.clamp(0, 6) - reference.clamp(0, 6)) / (before - reference)
        weight = (model.conv1, model.conv2)[layer].weight.detach()
        multiplier = functional.conv_transpose2d(multiplier, weight, stride=2, padding=1, output_padding=1)
        assert multiplier.shape[-1] == size
    assert close(of("deeplift", model, image), (multiplier * image).sum(1)[0])


def test_deeplift_of_an_activation_used_twice_is_that_of_two(image):
    apart, together = Net(bias=True), Net(bias=True)
    together.act2 = together.act1
    targets = torch.tensor([[0, 1]])
    assert torch.allclose(deeplift(together, image, targets), deeplift(apart, image, targets), rtol=1e-9)


def test_the_copy_computes_the_same(image):
    model = Net(lambda: nn.ReLU6(inplace=True), bias=True)
    model.act2 = model.act1
    twin = prepared(model, image, (nn.ReLU,))
    for _ in range(2):
        assert torch.equal(twin(image), model(image))
    assert model.act1.inplace


def test_deeplift_names_what_bends(image):
    with pytest.raises(ValueError, match=r"deeplift: the model bends where .* does not see it \(silu\)"):
        of("deeplift", Net(nn.SiLU), image)


def lrp_written_out(model, image, k):
    """z+ in the second convolution, flat in the first, epsilon (1e-6) in the head, proportion in the mean."""
    low = model.first(image).detach()
    high = model.second(low).detach()
    pooled = high.mean((2, 3))[0]
    weight = model.head.weight.detach()[k]
    logit = float(weight @ pooled)
    on_pooled = weight * pooled / (logit + math.copysign(1e-6, logit))
    share = on_pooled / (9 * pooled + 1e-30)
    relevance = reference.excitation_by_loops(share[None, :, None, None] * high, low, model.conv2.weight.detach(), 2, 1)
    ones = torch.ones_like(image)
    return reference.excitation_by_loops(relevance, ones, torch.ones_like(model.conv1.weight), 2, 1).sum(1)[0]


class CalledNet(Net):
    """The same, but for the convolutions and the head without modules, an addition of zero in between."""

    def first(self, x):
        return functional.relu(self.conv1(x), inplace=True)

    def second(self, x):
        x = self.conv2(x)
        x += 0 * x
        return x.clamp_(min=0)


def test_lrp_is_its_twin_in_any_spelling(image):
    with torch.no_grad():
        assert torch.allclose(Net()(image), CalledNet()(image))
    for model in (Net(), CalledNet()):
        ours = of("lrp", model, image)
        assert close(ours, lrp_written_out(model, image, 1), 1e-3)
        assert float(ours.sum()) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("inplace", [False, True])
def test_lrp_shares_a_skip_in_proportion(image, inplace):
    class Skip(Net):
        def forward(self, x):
            x = self.first(x)
            y = self.mid(x)
            if inplace:
                y += x
            else:
                y = x + y
            return self.head(self.pool(self.second(y)).flatten(1))

    model = Skip(signed=False)
    model.mid = nn.Conv2d(4, 4, 1, bias=False).double()
    model.mid.weight.data.abs_()
    model.pool = nn.AdaptiveAvgPool2d(1)
    assert float(of("lrp", model, image).sum()) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("act", [nn.ReLU6, nn.LeakyReLU, nn.SiLU])
def test_lrp_passes_functional_activations_as_it_does_modules(act, image):
    class Called(Net):
        def second(self, x):
            x = self.conv2(x)
            return {
                nn.ReLU6: lambda: functional.hardtanh(x, 0, 6, inplace=True),
                nn.LeakyReLU: lambda: functional.leaky_relu(x),
                nn.SiLU: lambda: functional.silu(x, inplace=True),
            }[act]()

    modules, called = Net(act), Called(act)
    for model in (modules, called):
        model.conv2.weight.data *= 5
    if act is nn.ReLU6:
        assert (modules.conv2(modules.first(image)) > 6).any()
    assert torch.equal(of("lrp", called, image), of("lrp", modules, image))


def normed_net(norm, where):
    model = Net(signed=False)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        norm.running_mean.uniform_(-1, 0)
        norm.running_var.uniform_(0.5, 2)
    setattr(model, where, nn.Sequential(getattr(model, where), norm.double().eval()))
    return model


def test_lrp_merges_batch_norm(image):
    norm = nn.BatchNorm2d(6)
    norm.bias.data.fill_(20)
    normed = normed_net(norm, "conv2")
    conv = normed.conv2[0]
    conv.weight.data[:, 1] *= -1
    merged = Net(signed=False)
    merged.conv2 = nn.Conv2d(4, 6, 3, 2, 1).double()
    scale = norm.weight.data / (norm.running_var + norm.eps).sqrt()
    merged.conv2.weight.data = conv.weight.data * scale[:, None, None, None]
    merged.conv2.bias.data = norm.bias.data - norm.running_mean * scale
    assert close(of("lrp", normed, image), of("lrp", merged, image))
    assert float(of("lrp", normed, image).sum()) < 0.9  # the bias takes its part


def test_lrp_merges_by_the_run_not_by_the_order_of_modules(image):
    """As in DenseNet: norm1, conv1 of the one layer, norm2, conv2 of the next."""

    class Dense(Net):
        def __init__(self):
            super().__init__(signed=False)
            self.layer1 = nn.Sequential(nn.Identity(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1, bias=False)).double()
            self.layer2 = nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1, bias=False)).double()
            for layer in (self.layer1[2], self.layer2[1]):
                layer.weight.data.abs_()
            self.eval()

        def first(self, x):
            x = super().first(x)
            return self.layer2(torch.cat([x, self.layer1(x)], 1))

    assert float(of("lrp", Dense(), image).sum()) == pytest.approx(1, rel=1e-3)


def test_lrp_passes_a_batch_norm_that_stays(image):
    model = normed_net(nn.BatchNorm2d(4), "act1")
    assert float(of("lrp", model, image).sum()) == pytest.approx(1, rel=1e-3)


# ---- networks that write in place


@pytest.mark.parametrize("name", ["gradcam", "layercam", "ebp", "guided", "deeplift", "lrp"])
def test_features_that_are_written_to_afterwards(name, image):
    class Dense(Net):
        inplace = True

        def forward(self, x):
            low = self.conv1(x)
            high = self.conv2(functional.relu(low, inplace=self.inplace) if name != "deeplift" else self.act1(low))
            high = functional.relu(high, inplace=self.inplace) if name != "deeplift" else self.act2(high)
            return self.head(high.mean((2, 3)))

    written, apart = Dense(lambda: nn.ReLU(inplace=True)), Dense()
    apart.inplace = False
    assert close(of(name, written, image), of(name, apart, image))


def test_excitation_is_read_before_a_skip_is_added_in_place(image):
    class Skip(Net):
        inplace = True

        def forward(self, x):
            low = self.first(x)
            y = self.mid(low)
            if self.inplace:
                y += low
            else:
                y = y + low
            return self.head(self.second(y).mean((2, 3)))

    written, apart = Skip(), Skip()
    apart.inplace = False
    written.mid = apart.mid = nn.Conv2d(4, 4, 1).double()
    for name in ("ebp", "cebp"):
        assert close(of(name, written, image), of(name, apart, image))


class Less(nn.Module):
    """Takes a half from each value, of what it was given or of a copy."""

    def __init__(self, inplace):
        super().__init__()
        self.writes = inplace

    def forward(self, x):
        return x.sub_(0.5) if self.writes else x - 0.5


@pytest.mark.parametrize("name", ["occlusion", "rise", "ebp", "guided", "tsgb-fused", "lrp"])
def test_an_image_that_the_network_writes_to(name):
    written = nn.Sequential(Less(True), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 3)).eval()
    apart = nn.Sequential(Less(False), *written[1:])
    images = torch.randn(1, 3, 16, 16)
    before = images.clone()
    assert close(of(name, written, images), of(name, apart, images))
    assert torch.equal(images, before)


# ---- what is covered


def test_occlusion_is_its_twin():
    """Windows of 2 x 2 in steps of 1 pixel over 16 x 16: what falls, meaned over the windows that cover a pixel."""
    model = Net()
    image = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        whole = model(image)[0, 1]
        total, count = torch.zeros(2, 16, 16, dtype=torch.float64)
        for y in range(15):
            for x in range(15):
                covered = image.clone()
                covered[:, :, y : y + 2, x : x + 2] = 0
                total[y : y + 2, x : x + 2] += whole - model(covered)[0, 1]
                count[y : y + 2, x : x + 2] += 1
    assert close(of("occlusion", model, image), total / count, 1e-4)


def test_rise_is_its_twin(image):
    """The masks from the same draws, each pixel interpolated by itself, on an image of 12 x 9: cells of 2 x 2."""
    model, image, count = Net(), image[..., :9], 24
    generator = torch.Generator().manual_seed(6)
    grids = torch.rand(count, 1, 7, 7, generator=generator) < 0.5
    down = torch.randint(0, 2, (count,), generator=generator)
    right = torch.randint(0, 2, (count,), generator=generator)
    expected = torch.zeros(3, 12, 9, dtype=torch.float64)
    for i in range(count):
        mask = reference_metrics.bilinear(grids[i, 0].double(), 16, 16)[down[i] : down[i] + 12, right[i] : right[i] + 9]
        odds = [math.exp(float(logit)) for logit in model(image * mask)[0].detach()]
        for k in range(3):
            expected[k] += odds[k] / sum(odds) * mask / (count * 0.5)
    ours = rise(model, image, torch.tensor([[0, 1, 2]]), 6, count)
    assert torch.allclose(ours[0], expected, rtol=1e-9)


def test_rise_weighs_all_masks_alike_where_nothing_matters():
    """With two classes of probability 1/2 the map is the mean mask: about p / p * 1/2 = 1/2 everywhere."""
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)).eval()
    model[2].weight.data.zero_()
    model[2].bias.data.zero_()
    map = of("rise", model, torch.rand(1, 3, 14, 14))
    assert float(map.mean()) == pytest.approx(0.5, abs=0.01)
    assert map.min() > 0.45
    assert map.max() < 0.55


def test_centre_by_hand():
    map = of("center", nn.Identity(), torch.zeros(1, 3, 3, 5))
    assert map[1].tolist() == pytest.approx([1 - d / math.hypot(1.5, 2.5) for d in (2, 1, 0, 1, 2)])
    assert map[0, 0] == pytest.approx(1 - math.sqrt(5) / math.hypot(1.5, 2.5))
