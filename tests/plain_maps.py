"""`rivalry`, `claims`, `depths` and the guided filter written again, slow and literal, for maps of two dimensions."""

import math

import torch


def rivalry(evidence, asked, alike=0.5, temperature=4.0, floor=0.3):
    """Every class, image and position by itself."""
    rows, count, height, width = evidence.shape
    places = [(i, j) for i in range(height) for j in range(width)]
    gate = torch.zeros_like(evidence[:asked])
    for n in range(count):
        for k in range(asked):
            unlike = {r: (alike + 0.1 - _correlation(evidence[k, n], evidence[r, n])) / 0.2 for r in range(asked, rows)}
            rivals = {r: min(1.0, share) for r, share in unlike.items() if share > 0}
            for p in places:
                own = math.exp(len(places) * evidence[(k, n, *p)] / temperature)
                others = sum(w * math.exp(len(places) * evidence[(r, n, *p)] / temperature) for r, w in rivals.items())
                gate[(k, n, *p)] = floor + (1 - floor) * own / (own + others)
    return gate


def claims(evidence, asked, gate, alike=0.5, temperature=4.0):
    """Every class, image and position by itself: what the class holds, and what its rivals do."""
    rows, count, height, width = evidence.shape
    places = [(i, j) for i in range(height) for j in range(width)]
    found = torch.zeros(2, *gate.shape, dtype=evidence.dtype)
    for n in range(count):
        for k in range(asked):
            unlike = {r: (alike + 0.1 - _correlation(evidence[k, n], evidence[r, n])) / 0.2 for r in range(asked, rows)}
            for p in places:
                mean = sum(evidence[(r, n, *p)] for r in range(asked, rows)) / (rows - asked)
                size = {r: math.exp(len(places) * evidence[(r, n, *p)] / temperature) for r in range(asked, rows)}
                found[(0, k, n, *p)] = gate[(k, n, *p)] * max(0.0, evidence[(k, n, *p)] - mean)
                for r in range(asked, rows):
                    held = max(0.0, evidence[(r, n, *p)] - mean) * size[r] / sum(size.values())
                    found[(1, k, n, *p)] += min(1.0, max(0.0, unlike[r])) * held
    return found


def depths(fields, image, claims=()):
    """The mean of the fields of all sizes, what lies around, and the class's ground, led by the image's edges."""
    out = []
    for k in range(len(fields[0])):
        of_class = [
            _one([field[k, n] for field in fields], image[n], [held[:, k, n] for held in claims])
            for n in range(fields[0].shape[1])
        ]
        out.append(torch.stack(of_class))
    return torch.stack(out)


def _one(fields, image, claims):
    finest = max((tuple(field.shape) for field in fields), key=lambda s: s[0] * s[1])
    by = math.ceil(min(finest) / 64)
    grid = tuple(round(n / by) for n in finest)
    fields = [_summed(field, grid) for field in fields]
    sizes = list(dict.fromkeys(tuple(field.shape) for field in fields))
    sums = {s: sum(field for field in fields if tuple(field.shape) == s) for s in sizes}
    side = min(grid)
    total, smooth = torch.zeros(grid, dtype=fields[0].dtype), []
    for s, field in sums.items():
        coarse = side / min(s) / 2 if min(s) < side else 0.0
        deviation = math.sqrt(max(0.0, (side / 64) ** 2 - coarse**2))
        smooth.append(_blurred(_on(field, grid), deviation))
    sign = 1 if any((field > 0).any() for field in smooth) else -1
    for field in smooth:
        total += _over_largest(sign * field)
    total = _over_largest(total)
    small = tuple(round(n / 4) for n in grid) if side > 32 else grid
    wide = _blurred(_on(total.clamp(min=0), small), min(small) / 8)
    value = total + _over_largest(_on(wide, grid)) / 5
    if claims:
        own, theirs = (sum(_on(held[i], small) for held in claims) for i in (0, 1))
        own, theirs = (_blurred(m, min(small) / 6) for m in (own, theirs))
        ground = own / (own + theirs + own.max() / 100) if own.max() > 0 else torch.zeros_like(own)
        value = torch.maximum(value, _on(ground, grid) / 5) + value.clamp(max=0)
    led = guided_filter(value, image, max(1, round(side / 14)), 0.02)
    led = torch.maximum(led, _on(value.clamp(max=0), image.shape[1:]))
    return sign * (led + _on(total.clamp(min=0) ** 4, image.shape[1:]) / 2)


def guided_filter(m, image, radius, epsilon):
    """In each window the plane over the colours that is nearest to the map; of a pixel, the mean of its windows'."""
    height, width = m.shape
    image = image if len(image) <= 4 else image.mean(0, keepdim=True)
    small = torch.stack([_on(channel, m.shape) for channel in image])
    middle = torch.stack([channel.mean() for channel in small])[:, None, None]
    size = ((small - middle) ** 2 + 1e-8 * small**2).mean((1, 2)).sqrt().clamp(min=1e-30)[:, None, None]
    colours, fine = (small - middle) / size, (image - middle) / size
    windows = {}
    for i in range(height):
        for j in range(width):
            rows = [min(max(i + t, 0), height - 1) for t in range(-radius, radius + 1)]
            columns = [min(max(j + t, 0), width - 1) for t in range(-radius, radius + 1)]
            seen = torch.stack([colours[:, a, b] for a in rows for b in columns])
            values = torch.stack([m[a, b] for a in rows for b in columns])
            centred = seen - seen.mean(0)
            matrix = centred.T @ centred / len(seen) + epsilon * torch.eye(len(image), dtype=m.dtype)
            slope = torch.linalg.solve(matrix, centred.T @ (values - values.mean()) / len(seen))
            windows[i, j] = torch.cat([slope, (values.mean() - slope @ seen.mean(0))[None]])
    lines = torch.zeros(len(image) + 1, height, width, dtype=m.dtype)
    for i in range(height):
        for j in range(width):
            rows = [min(max(i + t, 0), height - 1) for t in range(-radius, radius + 1)]
            columns = [min(max(j + t, 0), width - 1) for t in range(-radius, radius + 1)]
            lines[:, i, j] = torch.stack([windows[a, b] for a in rows for b in columns]).mean(0)
    lines = torch.stack([_on(line, image.shape[1:]) for line in lines])
    return (lines[:-1] * fine).sum(0) + lines[-1]


def _summed(m, grid):
    """A finer field on the grid, of the same sum."""
    is_finer = all(n >= g for n, g in zip(m.shape, grid, strict=True))
    return _on(m, grid) * m.numel() / math.prod(grid) if is_finer else m


def _over_largest(m):
    return m / m.max() if m.max() > 0 else torch.zeros_like(m)


def _correlation(a, b):
    sizes = [(x - x.mean()).square().sum().sqrt() + 1e-5 * x.square().sum().sqrt() + 1e-30 for x in (a, b)]
    return float(((a - a.mean()) * (b - b.mean())).sum() / (sizes[0] * sizes[1]))


def _on(m, size):
    """Means of areas on a coarser grid, the four neighbours by their nearness on a finer one."""
    size = tuple(size)
    if tuple(m.shape) == size:
        return m
    out = torch.zeros(size, dtype=m.dtype)
    is_coarser = m.shape[0] >= size[0] and m.shape[1] >= size[1]
    for i in range(size[0]):
        for j in range(size[1]):
            if is_coarser:
                rows, columns = (
                    slice(p * n // s, math.ceil((p + 1) * n / s)) for p, n, s in zip((i, j), m.shape, size, strict=True)
                )
                out[i, j] = m[rows, columns].mean()
                continue
            (a, b, u), (c, d, v) = (_between(p, n, s) for p, n, s in zip((i, j), m.shape, size, strict=True))
            out[i, j] = (1 - u) * ((1 - v) * m[a, c] + v * m[a, d]) + u * ((1 - v) * m[b, c] + v * m[b, d])
    return out


def _between(place, n, size):
    at = max(0.0, (place + 0.5) * n / size - 0.5)
    first = min(int(at), n - 1)
    return first, min(first + 1, n - 1), at - first


def _blurred(m, deviation):
    """A Gaussian cut at three deviations, along one side and then the other; beyond the border its value goes on."""
    reach = int(3 * deviation + 0.5)
    if reach == 0:
        return m
    weights = [math.exp(-((t / deviation) ** 2) / 2) for t in range(-reach, reach + 1)]
    for turned in (False, True):
        m = m.T if turned else m
        rows = [
            sum(w * m[min(max(i + t, 0), len(m) - 1)] for t, w in zip(range(-reach, reach + 1), weights, strict=True))
            for i in range(len(m))
        ]
        m = torch.stack(rows) / sum(weights)
        m = m.T if turned else m
    return m
