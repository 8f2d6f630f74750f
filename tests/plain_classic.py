"""The classic methods written out: one loop for each sum, float64, nothing shared with the package."""

import math

import torch


def excitation(relevance, x, weight, stride=1, padding=0, groups=1):
    """A convolution's probability of outputs (N, O, H, W), handed to its inputs x: share max(w x, 0) / Z."""
    below = torch.zeros_like(x)
    n_images, channels, height, width = x.shape
    outputs = weight.shape[0] // groups
    for n in range(n_images):
        for o in range(weight.shape[0]):
            first = o // outputs * (channels // groups)
            for i in range(relevance.shape[2]):
                for j in range(relevance.shape[3]):
                    shares = {}
                    for c in range(weight.shape[1]):
                        for a in range(weight.shape[2]):
                            for b in range(weight.shape[3]):
                                row, column = i * stride + a - padding, j * stride + b - padding
                                if 0 <= row < height and 0 <= column < width:
                                    value = float(weight[o, c, a, b] * x[n, first + c, row, column])
                                    shares[first + c, row, column] = max(value, 0.0)
                    total = sum(shares.values())
                    for place, share in shares.items():
                        if total > 0:
                            below[(n, *place)] += share / total * relevance[n, o, i, j]
    return below


def excitation_vector(relevance, x, weight):
    """The same for a linear layer: relevance (O,), x (C,), weight (O, C)."""
    below = torch.zeros_like(x)
    for o in range(len(weight)):
        shares = [max(float(weight[o, c] * x[c]), 0.0) for c in range(len(x))]
        for c in range(len(x)):
            if sum(shares) > 0:
                below[c] += shares[c] / sum(shares) * relevance[o]
    return below


def blur(map, sigma):
    """A Gaussian over whole pixels up to 4 sigma in each direction, edges repeated, for a map (H, W)."""
    radius = math.ceil(4 * sigma)
    height, width = map.shape
    result = torch.zeros_like(map)
    for y in range(height):
        for x in range(width):
            total = 0.0
            for dy in range(-radius, radius + 1):
                for dx in range(-radius, radius + 1):
                    weight = math.exp(-(dy**2 + dx**2) / (2 * sigma**2))
                    row, column = min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1)
                    result[y, x] += weight * float(map[row, column])
                    total += weight
            result[y, x] /= total
    return result


def bilinear(map, height, width):
    """Enlarge a map (h, w), pixel centres at (i + 1/2) / n, edges repeated."""
    result = torch.zeros(height, width, dtype=map.dtype)
    for i in range(height):
        for j in range(width):
            total = 0.0
            y, x = (i + 0.5) * map.shape[0] / height - 0.5, (j + 0.5) * map.shape[1] / width - 0.5
            for row in (math.floor(y), math.floor(y) + 1):
                for column in (math.floor(x), math.floor(x) + 1):
                    weight = (1 - abs(y - row)) * (1 - abs(x - column))
                    r, c = min(max(row, 0), map.shape[0] - 1), min(max(column, 0), map.shape[1] - 1)
                    total += weight * float(map[r, c])
            result[i, j] = total
    return result
