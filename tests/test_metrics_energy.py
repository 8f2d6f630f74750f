"""Energy and grid shares against their literal twins and numbers worked by hand."""

import pytest
import torch

import reference_metrics as plain
from tsgb.metrics import energy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_energy_and_grid_are_their_twins(dtype):
    maps, masks = torch.randn(5, 6, 4, dtype=dtype), torch.rand(5, 6, 4) < 0.4
    maps[1] = -maps[1].abs()
    maps[2] *= 1e-10
    inside, grid = energy.energy(maps, masks), energy.grid(maps, masks)
    assert inside.dtype == grid.dtype == torch.float64
    assert inside.tolist() == pytest.approx([plain.share(m, k) for m, k in zip(maps, masks, strict=True)], abs=1e-12)
    assert grid.tolist() == pytest.approx(
        [plain.share(m, k, 1e-7) for m, k in zip(maps, masks, strict=True)], abs=1e-12
    )
    assert float(inside[1]) == float(grid[1]) == float(grid[2]) == 0 < float(inside[2])


def test_energy_by_hand():
    # Positive: 4 + 2 + 2 + 8 = 16, of which the lower right quarter, the mask, holds 2 + 8.
    map = torch.tensor([[[4.0, -9.0, 0.0, 2.0], [-1.0, 0.0, 0.0, 0.0], [0.0, -3.0, 2.0, -7.0], [0.0, 0.0, 0.0, 8.0]]])
    assert energy.energy(map, plain.cells(2, 4, 4)[3:]).tolist() == [10 / 16]
    assert energy.grid(map.expand(4, 4, 4), energy.cells(2, 4, 4)).tolist() == [4 / 16, 2 / 16, 0, 10 / 16]


def test_a_grid_that_sums_to_the_limit_is_nothing():
    # 2^-24 is below 1e-7, 2^-23 above it.
    maps = torch.tensor([2.0**-24, 2.0**-23]).reshape(2, 1, 1)
    assert energy.grid(maps, torch.ones(2, 1, 1).bool()).tolist() == [0, 1]
    assert energy.grid(torch.full((1, 1, 1), 1e-7, dtype=torch.float64), torch.ones(1, 1, 1).bool()).tolist() == [0]


@pytest.mark.parametrize(("n", "height", "width"), [(1, 2, 3), (2, 4, 6), (3, 3, 9)])
def test_cells_are_their_twins(n, height, width):
    cells = energy.cells(n, height, width)
    assert torch.equal(cells, plain.cells(n, height, width))
    assert (cells.sum(0) == 1).all()


def test_power_of_the_positive_part():
    maps = torch.tensor([[[-2.0, 0.0, 4.0, 1e-20]]])
    assert energy.power(maps, 0.5)[0, 0].tolist() == pytest.approx([0, 0, 2, 1e-10])
    cube = energy.power(maps, 3)
    assert cube.dtype == torch.float64
    assert cube[0, 0].tolist() == pytest.approx([0, 0, 64, 1e-60], rel=1e-6, abs=0)


def test_wrong_arguments_are_named():
    maps, masks = torch.rand(2, 4, 4), torch.rand(2, 4, 4) > 0.5
    for function, name in ((energy.energy, "masks"), (energy.grid, "cells")):
        with pytest.raises(ValueError, match="map 0 holds NaN"):
            function(maps / 0 * 0, masks)
        with pytest.raises(ValueError, match=rf"{name} must have the maps' shape \(2, 4, 4\), got \(2, 4, 3\)"):
            function(maps, masks[..., :3])
        with pytest.raises(TypeError, match=rf"{name} must be a bool tensor"):
            function(maps, masks.float())
    for n, height, width in ((0, 4, 4), (3, 6, 4), (3, 4, 6), (2, 0, 4)):
        with pytest.raises(ValueError, match=f"multiples of n, at least 1, got {height} x {width} with n = {n}"):
            energy.cells(n, height, width)
    for exponent in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="exponent must be above 0, got"):
            energy.power(maps, exponent)
    with pytest.raises(ValueError, match="map 0 holds NaN"):
        energy.power(maps / 0, 2)
