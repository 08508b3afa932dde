"""Photos as vision Transformers read them: cut, scaled, normalised and in patches; and position tables of other sizes.

An image model has a table of learned positions for the class token and a square grid of patches. An image of another
size resizes the grid (arXiv 2010.11929, section 3.2).
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.errors import InputError, MissingDependencyError

SIDE = 224  # pixels, the usual size
# Mean and deviation of red, green and blue over ImageNet: torchvision, references/classification/presets.py
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)
MOST_PIXELS = 2**28  # of a scaled photo, 0.8 GB
_CUBIC = -0.75  # the free constant of cubic convolution (Keys 1981, eq. 4) in PyTorch's `interpolate`


def read_patches(path: Path, side: int, patch: int) -> np.ndarray:
    """A photo: shorter side scaled to `side` pixels (bicubic), centre cut out, channels normalised, cut into patches.

    Parameters
    ----------
    path : Path
        A file that Pillow reads.
    side, patch : int
        Pixels; `patch` divides `side`.

    Returns
    -------
    patches : array (1, (side / patch)^2, 3 patch^2), float32
        Row by row; in a patch channel, row, column.

    Raises
    ------
    InputError
        If the file is no image, or damaged.
    MissingDependencyError
        If Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError("reading images needs Pillow: pip install 'effref[models]'") from error
    try:
        with warnings.catch_warnings():  # of images that are large, not too large
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as an image ({error})") from error
    width, height = image.size
    scale = side / min(width, height)
    width, height = max(side, round(width * scale)), max(side, round(height * scale))
    if width * height > MOST_PIXELS:
        raise InputError(
            f"{path} is {image.width} x {image.height} pixels, {width} x {height} once the shorter side is {side}; at "
            f"most {MOST_PIXELS} in all are scaled: cut its longer side"
        )
    left, top = (width - side) // 2, (height - side) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
    pixels = (np.asarray(image, np.float32) / 255 - MEAN) / DEVIATION  # (side, side, 3)
    return cut(pixels.transpose(2, 0, 1)[None], patch)


def cut(pixels: np.ndarray, patch: int) -> np.ndarray:
    """Pixels (B, channels, height, width) as patches (B, rows * columns, channels * patch^2)."""
    batch, channels, height, width = pixels.shape
    parts = pixels.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return np.ascontiguousarray(parts.transpose(0, 2, 4, 1, 3, 5)).reshape(batch, -1, channels * patch**2)


def patch_side(features: int) -> int | None:
    """Pixels along a side of a square patch of three channels that has so many numbers; None without one."""
    side = math.isqrt(features // 3)
    return side if 3 * side**2 == features else None


def grid_side(positions: int) -> int | None:
    """Patches along a side of the square grid that, with a class token, has so many positions; None without one."""
    side = math.isqrt(max(positions - 1, 0))
    return side if side > 0 and side * side == positions - 1 else None


def resized_positions(table: Any, positions: int) -> Any:
    """The table of a class token and a square grid for another square grid; the first rows where there is none.

    Parameters
    ----------
    table : array (1 + g^2, d)
    positions : int
        T; 1 + n^2 for a grid of n x n patches.

    Returns
    -------
    table : array (T, d)
        Cubic convolution along rows, then columns, between the centres of patches; edges are repeated.
    """
    own, wanted = grid_side(len(table)), grid_side(positions)
    if own is None or wanted is None or own == wanted:
        return table[:positions]
    weights = _cubic_weights(own, wanted)  # (n, g)
    grid = np.asarray(table[1:], np.float64).reshape(own, own, -1)
    resized = np.einsum("ig,jh,ghd->ijd", weights, weights, grid, optimize=True).reshape(wanted**2, -1)
    return np.concatenate([table[:1], resized.astype(table.dtype)])


def _cubic_weights(own: int, wanted: int) -> np.ndarray:
    """The share (wanted, own) of each stored row in each row that is wanted (Keys, IEEE TASSP 29(6), 1981, eq. 4)."""
    centres = (np.arange(wanted) + 0.5) * own / wanted - 0.5
    weights = np.zeros((wanted, own))
    for tap in range(-1, 3):
        source = np.floor(centres) + tap
        x = np.abs(centres - source)
        near = ((_CUBIC + 2) * x - (_CUBIC + 3)) * x * x + 1
        far = _CUBIC * (((x - 5) * x + 8) * x - 4)
        np.add.at(weights, (np.arange(wanted), np.clip(source, 0, own - 1).astype(int)), np.where(x <= 1, near, far))
    return weights
