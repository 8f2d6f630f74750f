"""Relevance as a sum of terms: what its channels sum to, what it is when written out."""

import torch

from tsgb.engine.terms import ChannelSum, Dense, Factored, Thunk, add, channel_sum, dense, of_images


def terms():
    """Of three classes and two images, in each form that has channels, and their values."""
    torch.manual_seed(0)
    field, base, values = torch.rand(3, 2, 1, 4, 4), torch.rand(2, 5, 4, 4), torch.rand(3, 2, 5, 4, 4)
    weights = torch.rand(3, 2, 5, 1, 1)
    parts = [Factored(field, base, base.sum(1, keepdim=True)), Factored(weights, base, None), Dense(values)]
    return parts, [field * base, weights * base, values]


def test_terms_are_summed_over_the_channels():
    parts, values = terms()
    for part, value in zip(parts, values, strict=True):
        assert torch.allclose(channel_sum([part]), value.sum(2, keepdim=True), atol=1e-5)
    assert torch.allclose(channel_sum(parts), sum(values).sum(2, keepdim=True), atol=1e-5)
    summed = values[0].sum(2, keepdim=True)
    later = Thunk(lambda: calls.append(1) or summed)
    calls = []
    total = channel_sum([ChannelSum(summed), later])
    assert torch.allclose(total, 2 * summed)
    assert calls == [1]


def test_terms_are_written_out():
    parts, values = terms()
    given = [part.values.clone() for part in parts if isinstance(part, Dense)]
    for order in (parts, parts[::-1]):
        assert torch.allclose(dense(order), sum(values), atol=1e-5)
    assert torch.equal(parts[2].values, given[0])  # and left as they were


def test_terms_of_one_base_are_joined():
    parts, values = terms()
    joined = add([parts[0]], [parts[0], parts[2]])
    assert len(joined) == 2
    assert torch.allclose(dense(joined), 2 * values[0] + values[2], atol=1e-5)
    gradient = torch.rand(3, 2, 7)
    assert torch.equal(add(gradient, gradient), 2 * gradient)
    assert add(None, gradient) is gradient


def test_terms_of_some_of_the_images():
    parts, values = terms()
    rows = slice(1, 2)
    assert torch.allclose(dense(of_images(parts, rows)), sum(values)[:, rows], atol=1e-5)
    later = of_images([Thunk(lambda: values[0].sum(2, keepdim=True))], rows)
    assert torch.allclose(channel_sum(later), values[0].sum(2, keepdim=True)[:, rows])
