"""Photos as patches, and position tables of other grids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl import ModelConfig, forward, load_model
from refimpl.config import override, preset
from refimpl.errors import InputError
from refimpl.images import DEVIATION, MEAN, cut, grid_side, read_patches, resized_positions
from refimpl.inputs import load_input, sample

Image = pytest.importorskip("PIL.Image")
VIT: ModelConfig = override(preset("dinov2-s"), layers=2)

# torch.nn.functional.interpolate(mode="bicubic", align_corners=False) of [[0, 1, 4], [9, 16, 25], [36, 49, 64]]
RESIZED = {
    2: [[1.4308, 6.5224], [32.3974, 53.1808]],
    4: [
        [-0.6869, -0.5641, 0.9118, 2.6771],
        [2.4906, 4.7846, 9.6548, 13.5914],
        [19.0133, 24.7017, 34.8784, 42.2093],
        [36.974, 44.8336, 58.4047, 67.9069],
    ],
}


def _photo(path: Path, pixels: Any) -> Path:
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)
    return path


def test_patches_lie_row_by_row_with_channels_first() -> None:
    pixels = np.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    patches = cut(pixels, 2)
    assert patches.shape == (2, 6, 12)
    np.testing.assert_array_equal(patches[1, 4], pixels[1, :, 2:4, 2:4].ravel())


def test_a_photo_of_the_right_size_is_only_normalised(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3))
    patches = read_patches(_photo(tmp_path / "small.png", pixels), 28, 14)
    wanted = (pixels / 255 - MEAN.astype(float)) / DEVIATION
    np.testing.assert_allclose(patches[0, 1].reshape(3, 14, 14), wanted[:14, 14:].transpose(2, 0, 1), atol=1e-6)


def test_the_centre_is_cut_out_of_the_longer_side(tmp_path: Path) -> None:
    pixels = np.zeros((28, 56, 3))
    pixels[:, 14:42] = 255
    patches = read_patches(_photo(tmp_path / "wide.png", pixels), 28, 14).reshape(4, 3, -1)
    np.testing.assert_allclose(
        patches, np.broadcast_to(((1 - MEAN) / DEVIATION)[None, :, None], patches.shape), atol=1e-5
    )


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_every_colour_mode_becomes_three_channels(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("photo.jpg" if mode == "CMYK" else "photo.png")
    Image.new("RGB", (30, 40), (200, 10, 90)).convert(mode).save(path)
    assert read_patches(path, 28, 14).shape == (1, 4, 588)


@pytest.mark.parametrize("wanted", RESIZED)
def test_a_grid_is_resized_as_elsewhere(wanted: int) -> None:
    grid = (np.arange(9.0) ** 2)[:, None]
    table = np.concatenate([[[-5.0]], grid])
    resized = resized_positions(table, 1 + wanted**2)
    assert resized[0, 0] == -5.0
    np.testing.assert_allclose(resized[1:, 0].reshape(wanted, wanted), RESIZED[wanted], atol=1e-4)


@given(st.integers(1, 12), st.integers(1, 12), st.floats(-3, 3))
def test_a_flat_grid_stays_flat(own: int, wanted: int, level: float) -> None:
    table = np.full((1 + own**2, 2), level)
    np.testing.assert_allclose(resized_positions(table, 1 + wanted**2), level, atol=1e-12)


@given(st.integers(0, 10_000))
def test_grid_side_is_exact(positions: int) -> None:
    side = grid_side(positions)
    assert (side is not None) == any(1 + n * n == positions for n in range(1, 101))
    assert side is None or 1 + side * side == positions


def test_lengths_without_a_grid_take_the_first_rows() -> None:
    table = np.arange(20.0).reshape(10, 2)
    np.testing.assert_array_equal(resized_positions(table, 7), table[:7])


def test_a_pass_reads_the_resized_table() -> None:
    """The same weights with the resized table put in by hand give the same output, and the first rows do not."""
    model = load_model(VIT)
    patches = np.random.default_rng(1).standard_normal((1, 16, 588), dtype=np.float32)
    found = forward(model, patches).output
    model.weights.stem.positions = resized_positions(model.weights.stem.positions, 17)
    np.testing.assert_array_equal(forward(model, patches).output, found)


def test_a_runner_resizes_for_every_length() -> None:
    from refimpl import Runner

    runner = Runner(load_model(VIT), "numba")
    rng = np.random.default_rng(2)
    small, large = (rng.standard_normal((1, n * n, 588), dtype=np.float32) for n in (3, 5))
    first = runner(small).output.copy()
    runner(large)
    np.testing.assert_array_equal(runner(small).output, first)


def test_the_shipped_photo_is_read_at_every_size() -> None:
    model = load_model(VIT)
    found = load_input(model, sample("photo"))
    assert found.array.shape == (1, 256, 588)
    assert found.valid_positions == 257
    assert found.notes == ("photo.jpg at 224 pixels",)
    assert load_input(model, sample("photo"), 50).array.shape == (1, 49, 588)


@pytest.mark.parametrize(
    ("seq", "said"),
    [(256, "give seq = 1 \\+ n\\^2"), (0, "at least 1"), (1 + 40**2, "1370 positions")],
)
def test_lengths_that_no_photo_has_are_refused(seq: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_input(load_model(VIT), sample("photo"), seq)


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n", b"not an image"])
def test_files_that_are_no_image_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"broken\.png cannot be read as an image"):
        load_input(load_model(VIT), path)


def test_a_strip_that_would_fill_memory_is_refused(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (1, 6000)).save(tmp_path / "line.png")  # 224 x 1 344 000 once it is scaled
    with pytest.raises(InputError, match="cut its longer side"):
        load_input(load_model(VIT), tmp_path / "line.png")
    Image.new("RGB", (2, 200)).save(tmp_path / "strip.png")
    assert load_input(load_model(VIT), tmp_path / "strip.png").valid_positions == 257


def test_a_large_photo_is_no_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow warns from 89 million pixels, and refuses twice as many."""
    from PIL import Image

    Image.new("RGB", (30, 30)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 800)
    assert load_input(load_model(VIT), tmp_path / "x.png").kind == "patches"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with pytest.raises(InputError, match="cannot be read as an image"):
        load_input(load_model(VIT), tmp_path / "x.png")


def test_a_truncated_photo_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "half.jpg"
    path.write_bytes(sample("photo").read_bytes()[:15_000])
    with pytest.raises(InputError, match=r"half\.jpg cannot be read as an image"):
        load_input(load_model(VIT), path)
