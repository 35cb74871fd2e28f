"""The pattern of a large matrix in a few cells, as numbers and as an SVG for notebooks, which needs no matplotlib."""

from __future__ import annotations

import numpy as np
from torch import Tensor

CELLS = 300  # rows and columns of the picture of a matrix, at most
_LEVELS = 4  # of strength in a thumbnail


def _edges(size: int, cells: int) -> np.ndarray:
    """Where the cells begin and end that so many positions are laid into: position i lies in cell i cells // size."""
    return -(-np.arange(cells + 1) * size // cells)


def pattern_image(indices: Tensor, shape: tuple[int, int], cells: int = CELLS) -> np.ndarray:
    """The share of stored positions in each cell of a grid that is laid over the matrix, NaN where there is none.

    No cell is smaller than a position. Shares rather than counts, since not all cells are of the same size.
    """
    sizes = [max(1, min(size, cells)) for size in shape]
    place = [(index.numpy() * k) // max(1, size) for index, k, size in zip(indices, sizes, shape, strict=True)]
    counts = np.bincount(place[0] * sizes[1] + place[1], minlength=sizes[0] * sizes[1]).reshape(sizes).astype(float)
    areas = np.outer(*(np.diff(_edges(size, k)) for size, k in zip(shape, sizes, strict=True)))
    image = counts / np.maximum(1, areas)
    image[counts == 0] = np.nan
    return image


def thumbnail(indices: Tensor, shape: tuple[int, int], cells: int = 48) -> str:
    """An SVG of a pattern, some kilobytes, that needs no matplotlib: stronger where more of a cell is stored.

    Its colour is that of the text around it, so that it is seen on light and on dark ground.
    """
    image = np.nan_to_num(pattern_image(indices, shape, cells))
    rows, columns = image.shape
    level = np.ceil(_LEVELS * image**0.5).astype(int)  # 0 for none
    paths = []
    for strength in range(1, _LEVELS + 1):
        runs = []
        for i in range(rows):
            ends = np.flatnonzero(np.diff(level[i] == strength, prepend=False, append=False))
            runs += [f"M{j} {i}h{k - j}v1h{j - k}z" for j, k in ends.reshape(-1, 2).tolist()]
        if runs:
            paths.append(f'<path opacity="{0.2 + 0.8 * strength / _LEVELS:.2g}" d="{"".join(runs)}"/>')
    scale = min(160 / max(rows, columns), 12)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{columns * scale:.0f}" height="{rows * scale:.0f}" '
        f'viewBox="0 0 {columns} {rows}" preserveAspectRatio="none" fill="currentColor" shape-rendering="crispEdges" '
        f'style="border: 1px solid currentColor">{"".join(paths)}</svg>'
    )
