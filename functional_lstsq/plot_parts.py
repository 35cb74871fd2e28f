"""What pictures are made of: axes, colours for light and dark ground, and images of large matrices in a few cells."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .sparse.picture import CELLS, pattern_image

__all__ = ["INSTALL", "axes_of", "colours", "draw_image", "is_dark", "pattern_image", "show_whole"]
INSTALL = "plot needs matplotlib: pip install 'functional-lstsq[plot]'"


def axes_of(ax: Any) -> Any:
    """The axes given, or those of a new figure of pyplot, where there is matplotlib."""
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ImportError(INSTALL) from None
    return pyplot.subplots(layout="constrained")[1]


def is_dark(ax: Any) -> bool:
    """Whether the ground of the axes is dark."""
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(ax.get_facecolor())
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5


def colours(dark: bool, *, whole: bool) -> Any:
    """Blues, stronger for more; without those that do not stand out against the ground, unless the `whole` is full."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    scale = (1.0 if whole else 0.75, 0.0) if dark else (0.0 if whole else 0.4, 1.0)
    return ListedColormap(colormaps["Blues"](np.linspace(*scale, 256)))


def show_whole(numbers: Tensor, cells: int = CELLS) -> np.ndarray:
    """Numbers (m, n), not negative, as an image of few columns: the largest of each cell; NaN for zero."""
    m, n = numbers.shape
    width = max(1, min(n, cells))
    place = (torch.arange(n) * width // max(1, n)).expand(m, -1)
    image = torch.zeros(m, width, dtype=torch.float64).scatter_reduce(1, place, numbers.double(), "amax")
    return torch.where(image > 0, image, torch.nan).numpy()


def draw_image(ax: Any, image: np.ndarray, shape: tuple[int, int], label: str, *, linear: bool = False) -> None:
    """An image of a matrix of that shape, sizes on a logarithmic scale, with a bar of colours where there is a label.

    An image, also in an SVG: a marker for each entry would make a file that nothing opens.
    """
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import MaxNLocator

    m, n = (max(1, size) for size in shape)
    known = image[np.isfinite(image)]
    # A few numbers that are nearly zero would leave one colour to all others.
    low, high = (float(np.quantile(known, 0.02)), float(known.max())) if known.size else (1.0, 1.0)
    norm = Normalize(0, high) if linear else LogNorm(min(low, high / 10), high)
    shown = ax.imshow(
        image,
        cmap=colours(is_dark(ax), whole=linear),
        norm=norm,
        extent=(0, n, m, 0),
        aspect="auto",
        interpolation="nearest",
    )
    ax.set(xlim=(0, n), ylim=(m, 0))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True))
    if label:
        ax.figure.colorbar(shown, ax=ax, label=label, shrink=0.8)
