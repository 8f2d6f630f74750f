"""Small networks in all the spellings that models use, each with its twin in the operators of `plain`."""

import torch
from torch import nn
from torch.nn import functional

from plain import Plain


class Spelled(nn.Module):
    """A network: `forward` as users write it, `twin` in plain operators. float64, in evaluation mode, seeded."""

    hidden = False  # whether a hidden layer lies below the head, which sets f

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.build()
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_(0, 0.1)
        self.double().eval()

    def build(self) -> None:
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(4, eps=1e-3)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def plain_head(self, p: Plain, x):
        return p.linear_head(x.mean((2, 3)), self.head.weight, self.head.bias)

    def residual_twin(self, p: Plain, x, act=functional.relu, slope=0.0):
        """What most of the spellings below spell."""
        x = p.passing(p.norm(p.layer(x, self.conv1), self.norm1), act, slope)
        y = p.norm(p.layer(x, self.conv2), self.norm2)
        return self.plain_head(p, p.passing(y + x, act, slope))


class InPlaceModules(Spelled):
    def build(self):
        super().build()
        self.relu = nn.ReLU(inplace=True)  # one module for all places

    def forward(self, x):
        x = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(x))
        y += x
        return self.head(torch.flatten(functional.adaptive_avg_pool2d(self.relu(y), 1), 1))

    twin = Spelled.residual_twin


class Functions(InPlaceModules):
    def forward(self, x):
        x = functional.conv2d(input=x, weight=self.conv1.weight, bias=self.conv1.bias, padding=(1, 1))
        x = functional.relu(functional.batch_norm(x, **self._norm(self.norm1)))
        y = torch.conv2d(x, self.conv2.weight, self.conv2.bias, 1, 1)
        y = functional.batch_norm(y, **self._norm(self.norm2))
        y = torch.relu(torch.add(x, y))
        return functional.linear(y.mean(dim=(2, 3)), self.head.weight, bias=self.head.bias)

    @staticmethod
    def _norm(norm):
        return {
            "running_mean": norm.running_mean,
            "running_var": norm.running_var,
            "weight": norm.weight,
            "bias": norm.bias,
            "eps": norm.eps,
        }


class Methods(InPlaceModules):
    def forward(self, x):
        x = self.norm1(self.conv1(x)).relu()
        y = self.norm2(self.conv2(x)).add(x).clamp(min=0)
        return torch.addmm(self.head.bias, y.mean([2, 3]), self.head.weight.t())


class DroppedReturns(InPlaceModules):
    def forward(self, x):
        x = self.norm1(self.conv1(x))
        functional.relu(x, inplace=True)
        y = self.norm2(self.conv2(x))
        y.add_(x)
        y.relu_()
        return y.mean((2, 3)) @ self.head.weight.T + self.head.bias


class PositionalInPlace(InPlaceModules):
    def forward(self, x):
        x = self.norm1(self.conv1(x))
        functional.relu(x, True)
        y = self.norm2(self.conv2(x))
        y = torch.relu_(y.add_(x))
        return self.head(y.flatten(2).mean(-1))


class OverwritesWhatBackwardNeeds(Spelled):
    """Right in inference, an error in ordinary training: the input of a convolution is changed after it."""

    def forward(self, x):
        x = functional.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(x))
        x += y
        x.relu_()
        return self.head(x.mean((2, 3)))

    twin = Spelled.residual_twin


class ReLU6(Spelled):
    def forward(self, x):
        x = functional.hardtanh(self.norm1(self.conv1(x * 3)), 0.0, 6.0, inplace=True)
        y = self.norm2(self.conv2(x))
        return self.head((y + x).clamp_(0, 6).mean((2, 3)))

    def twin(self, p, x):
        return self.residual_twin(p, x * 3, functional.relu6)


class SiLUByHand(Spelled):
    def forward(self, x):
        x = self.norm1(self.conv1(x))
        x = x * torch.sigmoid(x)
        y = self.norm2(self.conv2(x)) + x
        gate = y.sigmoid()
        y *= gate
        return self.head(y.mean((2, 3)))

    def twin(self, p, x):
        x = p.norm(p.layer(x, self.conv1), self.norm1)
        x = p.gated(x, torch.sigmoid(x))
        y = p.norm(p.layer(x, self.conv2), self.norm2) + x
        return self.plain_head(p, p.gated(y, torch.sigmoid(y)))


class SiLUInPlace(SiLUByHand):
    def forward(self, x):
        x = self.norm1(self.conv1(x))
        functional.silu(x, inplace=True)
        y = self.norm2(self.conv2(x))
        y += x
        return self.head(functional.silu(y).mean((2, 3)))


class HardswishByHand(Spelled):
    def forward(self, x):
        x = self.norm1(self.conv1(x * 2))
        x = x * functional.relu6(x + 3) / 6
        y = self.norm2(self.conv2(x)) + x
        return self.head((y * functional.hardsigmoid(y)).mean((2, 3)))

    def twin(self, p, x):
        def act(x):
            return p.gated(x, functional.relu6(x + 3)) / 6

        x = act(p.norm(p.layer(x * 2, self.conv1), self.norm1))
        return self.plain_head(p, act(p.norm(p.layer(x, self.conv2), self.norm2) + x))


class SqueezeAndExcitation(Spelled):
    def build(self):
        super().build()
        self.squeeze, self.excite = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x):
        x = functional.relu(self.norm1(self.conv1(x)))
        gate = self.excite(functional.relu(self.squeeze(functional.adaptive_avg_pool2d(x, 1)))).sigmoid()
        x = self.conv2(gate.expand_as(x) * x)
        return self.head(functional.leaky_relu(x, 0.1, inplace=True).mean((2, 3)))

    def twin(self, p, x):
        x = p.passing(p.norm(p.layer(x, self.conv1), self.norm1), functional.relu)
        gate = p.passing(p.layer(x.mean((2, 3), keepdim=True), self.squeeze), functional.relu)
        x = p.layer(p.gated(x, torch.sigmoid(p.layer(gate, self.excite))), self.conv2)
        return self.plain_head(p, p.passing(x, lambda s: functional.leaky_relu(s, 0.1), 0.1))


class Geometries(Spelled):
    def build(self):
        self.same = nn.Conv2d(3, 6, 3, padding="same", dilation=2)
        self.grouped = nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2, bias=False)
        self.depthwise = nn.Conv2d(4, 4, (3, 1), padding=(1, 0), groups=4)
        self.wide = nn.Conv2d(4, 4, 2)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = functional.max_pool2d(functional.relu(self.same(x)), 3, 2, ceil_mode=True)
        x = functional.relu(self.depthwise(self.grouped(x)))
        return self.head(functional.relu(self.wide(x)).mean((2, 3)))

    def twin(self, p, x):
        same = self.same
        x = p.passing(p.conv(x, same.weight, same.bias, 1, 2, 2), functional.relu)
        x = functional.max_pool2d(x, 3, 2, ceil_mode=True)
        x = p.passing(p.layer(p.layer(x, self.grouped), self.depthwise), functional.relu)
        return self.plain_head(p, p.passing(p.layer(x, self.wide), functional.relu))


class Halves(Spelled):
    """Parts of a tensor that are written in place."""

    def forward(self, x):
        x = self.norm1(self.conv1(x))
        a, b = x.chunk(2, dim=1)
        functional.relu_(a)
        b.clamp_(min=0)
        y = self.norm2(self.conv2(x)).add(other=x)
        y[:, ::2] += y[:, 1::2]
        return self.head(y.relu_().mean((2, 3)))

    def twin(self, p, x):
        x = p.passing(p.norm(p.layer(x, self.conv1), self.norm1), functional.relu)
        y = p.norm(p.layer(x, self.conv2), self.norm2) + x
        y = torch.stack([y[:, 0] + y[:, 1], y[:, 1], y[:, 2] + y[:, 3], y[:, 3]], 1)
        return self.plain_head(p, p.passing(y, functional.relu))


class ScaledLogits(Spelled):
    """What stands above the head is no evidence: its derivative counts, not its values."""

    def build(self):
        super().build()
        self.last = nn.BatchNorm1d(5)
        self.last.bias.data.normal_()

    def forward(self, x):
        x = functional.relu(self.norm1(self.conv1(x)))
        return torch.tanh(self.last(self.head(x.mean((2, 3)))) / 0.5 - 0.1)

    def twin(self, p, x):
        x = p.passing(p.norm(p.layer(x, self.conv1), self.norm1), functional.relu)
        last = self.last
        x = (self.plain_head(p, x) - last.running_mean) / (last.running_var + last.eps).sqrt() * last.weight + last.bias
        return torch.tanh(x / 0.5 - 0.1)


class Reused(Spelled):
    """One convolution and one norm in two places."""

    def forward(self, x):
        x = self.conv1(x)
        for _ in range(2):
            x = self.norm2(self.conv2(x)).relu()
        return self.head(x.mean((2, 3)))

    def twin(self, p, x):
        x = p.layer(x, self.conv1)
        for _ in range(2):
            x = p.passing(p.norm(p.layer(x, self.conv2), self.norm2), functional.relu)
        return self.plain_head(p, x)


class Dense(Spelled):
    def build(self):
        super().build()
        self.head = nn.Linear(11, 5)

    def forward(self, x):
        y = functional.relu(self.norm1(self.conv1(x)))
        y = torch.cat([x, y], 1)
        z = self.conv2(y[:, 3:])
        y = torch.cat((y, functional.relu(z)), dim=1)
        return self.head(functional.avg_pool2d(y, y.shape[2:]).flatten(1))

    def twin(self, p, x):
        y = p.passing(p.norm(p.layer(x, self.conv1), self.norm1), functional.relu)
        y = torch.cat([x, y, p.passing(p.layer(y, self.conv2), functional.relu)], 1)
        return self.plain_head(p, y)


class HiddenLayers(Spelled):
    hidden = True

    def build(self):
        super().build()
        self.hidden1, self.hidden2 = nn.Linear(4 * 9, 16), nn.Linear(16, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = functional.relu(self.norm1(self.conv1(x)))
        x = functional.adaptive_max_pool2d(self.conv2(x), 3).flatten(1)
        x = functional.dropout(torch.tanh(self.hidden1(x)), 0.5, self.training)
        return self.head(functional.relu(torch.matmul(x, self.hidden2.weight.mT) + self.hidden2.bias))

    def twin(self, p, x):
        x = p.passing(p.norm(p.layer(x, self.conv1), self.norm1), functional.relu)
        x = functional.adaptive_max_pool2d(p.layer(x, self.conv2), 3).flatten(1)
        x = p.passing(functional.linear(x, self.hidden1.weight, self.hidden1.bias), torch.tanh, 1.0)
        x = p.passing(functional.linear(x, self.hidden2.weight, self.hidden2.bias), functional.relu)
        return p.linear_head(x, self.head.weight, self.head.bias)


class ConvolutionalHead(Spelled):
    def build(self):
        super().build()
        self.classifier = nn.Conv2d(4, 5, 1)

    def forward(self, x):
        x = functional.leaky_relu(self.norm1(self.conv1(x)), 0.1)
        return functional.relu(self.classifier(x) + 0.5).mean((2, 3))

    def twin(self, p, x):
        x = p.passing(p.norm(p.layer(x, self.conv1), self.norm1), lambda s: functional.leaky_relu(s, 0.1), 0.1)
        return functional.relu(p.conv_head(x, self.classifier.weight, self.classifier.bias) + 0.5).mean((2, 3))


class NormalisesItsInput(Spelled):
    def build(self):
        super().build()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6])[:, None, None])
        self.register_buffer("std", torch.tensor([0.2, 0.3, 0.25])[:, None, None])

    def forward(self, x):
        x = functional.relu(self.norm1(self.conv1((x - self.mean) / self.std)))
        return self.head(functional.relu(1 - self.conv2(x)).mean((2, 3)))

    def twin(self, p, x):
        x = p.layer(p.shift(x, lambda s: s - self.mean) / self.std, self.conv1)
        x = p.passing(p.norm(x, self.norm1), functional.relu)
        return self.plain_head(p, p.passing(p.shift(p.layer(x, self.conv2), lambda s: 1 - s), functional.relu))


class NormalisesInPlace(NormalisesItsInput):
    def forward(self, x):
        x.sub_(self.mean).div_(self.std)
        x = functional.relu(self.norm1(self.conv1(x)))
        return self.head((1 - self.conv2(x)).relu_().mean((2, 3)))


class Transitions(Spelled):
    """Average pooling over small windows, which the paper treats in its own way."""

    def forward(self, x):
        x = functional.avg_pool2d(self.norm1(self.conv1(x)), 3, 2, 1)
        return self.head(functional.relu(self.conv2(x)).mean((2, 3)))

    def twin(self, p, x):
        from plain import _Operator, avg_pool

        x = p.norm(p.layer(x, self.conv1), self.norm1)
        if p.paper:
            pool = lambda s: functional.avg_pool2d(s, 3, 2, 1)  # noqa: E731
            x = _Operator.apply(x, pool, lambda grad, s: avg_pool(grad, s, 3, 2, 1))
        else:
            x = functional.avg_pool2d(x, 3, 2, 1)
        return self.plain_head(p, p.passing(p.layer(x, self.conv2), functional.relu))


def _all(base: type[Spelled]) -> list[type[Spelled]]:
    found = [base] if "forward" in vars(base) else []
    return found + [network for child in base.__subclasses__() for network in _all(child)]


SPELLED = _all(Spelled)
