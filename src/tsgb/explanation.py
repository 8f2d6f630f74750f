"""What `tsgb.explain` returns: maps, and what is needed to judge, draw and keep them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

__all__ = ["Explanation", "Row"]

Row = tuple[str, str | None, int]


@dataclass(frozen=True, eq=False)
class Explanation:
    """What `explain` returns: maps, and what is needed to judge them.

    Attributes:
        maps: (N, K, *spatial) float32 (float64 for float64 images), signed, raw: sum over channels of image * gradient.
            A tuple of such tensors for several inputs.
        targets: (N, K) int64 class indices, -1 for a callable target.
        logits: the model's logits, (N, classes) for a classifier; None where a callable target reads an output without
        them.
        coverage: rows (operator, rule or None, count), which operator met which rule. None: a weighted or curved
            operator that met none and kept its ordinary gradient.
        why_empty: N lists of K, for a map without positive values the reason, else None.
        f: the number f of the head's rule.
        images: the input (or tuple of inputs) explained, as it was given.
    """

    maps: Any
    targets: Tensor
    logits: Any
    coverage: list[Row]
    why_empty: list[list[str | None]]
    f: float
    images: Any

    def __repr__(self) -> str:
        """Summarise: an explanation holds too many numbers to print."""
        shape = [tuple(m.shape) for m in self.maps] if isinstance(self.maps, tuple) else tuple(self.maps.shape)
        return f"Explanation(maps={shape}, targets={self.targets.tolist()}, f={self.f:g})"

    def overlay(
        self,
        picture: Image.Image | str | Path | None = None,
        image: int = 0,
        target: int = 0,
        *,
        colormap: str = "jet",
        alpha: float = 0.5,
        scale: float | None = None,
    ) -> Image.Image:
        """Lay one map over its picture.

        Args:
            picture: the picture that the input shows as a whole (a Pillow image or a file), of any size; None shows the
                input itself, stretched to the range of its own values.
            image: index of the image, 0..N-1. ``target``: index of the target, 0..K-1.
            colormap: "jet", "viridis", or "bwr" for the signed map.
            alpha: opacity of the strongest evidence, 0..1.
            scale: the value that gets the full colour; None takes the map's 99th percentile.

        Returns:
            RGB picture of the size of ``picture``.

        Raises:
            ValueError: the maps are not two-dimensional.

        Example:
            >>> import torch, tsgb
            >>> e = tsgb.explain(tsgb.load("bundled").model, torch.rand(1, 3, 128, 128))
            >>> e.overlay().size
            (128, 128)
        """
        from . import render

        shown = self._picture(image, picture)
        return render.overlay(shown, self._map(image, target, shown.size), colormap=colormap, alpha=alpha, scale=scale)

    def save(self, folder: str | Path, pictures: Sequence[Image.Image | str | Path] | None = None) -> list[Path]:
        """Write every map as an overlay and as an array: ``<image>_<class>.png`` and ``.npy``.

        Args:
            folder: where to; made if missing. Files of the same name are replaced, each as a whole.
            pictures: one picture an image, as in `overlay`; their files' stems name the files, else the image's index.

        Returns:
            The paths written.

        Raises:
            ValueError: not one picture an image. OSError: the folder cannot be written.

        Example:
            >>> import tempfile, torch, tsgb
            >>> e = tsgb.explain(tsgb.load("bundled").model, torch.rand(1, 3, 128, 128), target=3)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     [path.name for path in e.save(folder)]
            ['0_3.png', '0_3.npy']
        """
        from pathlib import Path

        from . import render

        count, k = self.targets.shape
        if pictures is not None and len(pictures) != count:
            raise ValueError(f"pictures must be one an image, {count}, got {len(pictures)}")
        shown = [self._picture(n, pictures[n] if pictures else None) for n in range(count)]
        written = []
        for n, stem in enumerate(_stems(pictures, count)):
            for j in range(k):
                label = str(int(self.targets[n, j])) if self.targets[n, j] >= 0 else "target"
                png, npy = (Path(folder) / f"{stem}_{label}.{kind}" for kind in ("png", "npy"))
                render.save(render.overlay(shown[n], self._map(n, j, shown[n].size)), png)
                render.save_map(self._map(n, j), npy)
                written += [png, npy]
        return written

    def _map(self, image: int, target: int, size: tuple[int, int] | None = None) -> Any:
        """One map, in the network's pixels or laid over a picture of a size (width, height)."""
        maps = self.maps[0] if isinstance(self.maps, tuple) else self.maps
        if maps.dim() != 4:
            raise ValueError(f"only maps (N, K, H, W) can be drawn, got {tuple(maps.shape)}")
        map = maps[image, target].cpu().numpy()
        if size is None:
            return map
        from .preprocessing import Preprocessing

        return Preprocessing(size=map.shape).restore(map, size)

    def _picture(self, image: int, picture: Any) -> Image.Image:
        """The picture to draw on: as given, read from a file, or made from the input."""
        from PIL import Image

        if isinstance(picture, Image.Image):
            return picture.convert("RGB")
        if picture is not None:
            from . import pictures

            return pictures.read(picture)
        images = self.images[0] if isinstance(self.images, tuple) else self.images
        values = images[image].detach().float().cpu()
        span = (values - values.min()) / (values.max() - values.min()).clamp(min=1e-12)
        channels = span if len(span) == 3 else span.mean(0, keepdim=True).expand(3, *span.shape[1:])
        return Image.fromarray((channels * 255).round().byte().permute(1, 2, 0).contiguous().numpy())


def _stems(pictures: Sequence[Any] | None, count: int) -> list[str]:
    """File stems for the images: their pictures' where all are files, else their indices."""
    from pathlib import Path

    if pictures is None or not all(isinstance(picture, (str, Path)) for picture in pictures):
        return [str(n) for n in range(count)]
    from .pictures import labels

    return labels([Path(picture) for picture in pictures])
