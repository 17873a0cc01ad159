import numpy as np
import pytest

from lightning_genseg.visualize import colorize, grid, heat_map, overlay, score_range

PALETTE = [(10, 20, 30), (200, 0, 0), (0, 255, 0)]
MASK = np.array([[0, 1, 2], [255, 1, 0]], dtype=np.uint8)


def test_colorize_uses_the_palette_and_black():
    colors = colorize(MASK, PALETTE)
    assert colors.shape == (2, 3, 3)
    assert colors.dtype == np.uint8
    assert colors[0].tolist() == [list(color) for color in PALETTE]
    assert colors[1, 0].tolist() == [0, 0, 0]
    np.testing.assert_array_equal(colorize(MASK.astype(np.int64), PALETTE), colors)


@pytest.mark.parametrize("label", [3, 254, -1])
def test_colorize_refuses_a_label_without_colour(label):
    with pytest.raises(ValueError, match="the palette has 3 colours"):
        colorize(np.array([[0, label]]), PALETTE)


def test_overlay_blends_and_leaves_ignored_pixels_alone():
    image = np.full((2, 3, 3), 100, dtype=np.uint8)
    picture = overlay(image, MASK, PALETTE, alpha=0.25)
    assert picture[0, 1].tolist() == [125, 75, 75]
    assert picture[1, 0].tolist() == [100, 100, 100]
    np.testing.assert_array_equal(overlay(image, MASK, PALETTE, alpha=0), image)
    assert (image == 100).all()
    with pytest.raises(ValueError, match=r"the image is \(3, 3\) but the mask \(2, 3\)"):
        overlay(np.zeros((3, 3, 3), np.uint8), MASK, PALETTE)


def test_heat_map_is_brighter_for_higher_scores():
    score = np.linspace(-50, 50, 64, dtype=np.float32).reshape(8, 8)
    brightness = heat_map(score).astype(float).sum(-1).ravel()
    assert (np.diff(brightness) >= -3).all()  # rounding of single channels
    assert brightness[-1] - brightness[0] > 400
    np.testing.assert_array_equal(heat_map(score, 0, 1)[:4], heat_map(score[:4] * 0, 0, 1))


def test_heat_map_of_constant_and_non_finite_scores():
    score = np.full((4, 4), 3.0)
    assert (heat_map(score) == heat_map(score)[0, 0]).all()
    score[0] = np.nan, np.inf, -np.inf, 3.0
    assert (heat_map(score)[0, :3] == 128).all()
    assert (heat_map(np.full((2, 2), np.nan)) == 128).all()


def test_score_range_is_not_stretched_by_outliers():
    scores = np.concatenate([np.linspace(0, 1, 1000), [1e6, -np.inf]])
    low, high = score_range(scores[None])
    assert 0 <= low < 0.02
    assert 0.98 < high < 1.001


def test_grid_places_pictures_titles_and_legend():
    tall = np.full((20, 10, 3), 50, np.uint8)
    wide = np.full((10, 200, 3), 90, np.uint8)
    names = [(f"class number {i}", (i, 200, 0)) for i in range(12)]
    plain = grid([[tall, tall], [wide, wide]], cell_width=100, gap=5)
    assert plain.size == (2 * 100 + 3 * 5, 5 + 200 + 5 + 5 + 5)
    full = grid([[tall, tall], [wide, wide]], ["left", "right"], names, 100, 5)
    assert full.width == plain.width
    assert full.height > plain.height + 3 * 10  # the legend needs several lines
    pixels = np.asarray(full)
    for _, color in names:
        assert (pixels == color).all(-1).any()
    for column in (0, 1):  # dark text above each column
        assert pixels[:16, 5 + column * 105 : 105 + column * 105].min() < 100
    assert np.asarray(plain)[6, 6].tolist() == [50, 50, 50]
    with pytest.raises(ValueError, match="no picture"):
        grid([])


def test_grid_captions_rows():
    dark = np.full((10, 10, 3), 10, np.uint8)
    plain = grid([[dark], [dark]], cell_width=100, gap=5)
    named = grid([[dark], [dark]], cell_width=100, gap=5, captions=["a", "b"])
    line = (named.height - plain.height) // 2
    assert line > 10
    pixels = np.asarray(named)
    for top in (5, 5 + line + 100 + 5):  # text on white, then the picture
        assert pixels[top : top + line].min() < 100
        assert pixels[top : top + line, 50:].min() == 255
        assert (pixels[top + line : top + line + 100, 5:105] == 10).all()


def test_grid_keeps_enlarged_pixels_sharp():
    board = (np.indices((4, 4)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, -1)
    picture = np.asarray(grid([[board]], cell_width=40, gap=0))
    assert set(np.unique(picture)) == {0, 255}
    assert (picture[:10, :10] == 0).all()
