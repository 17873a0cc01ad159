import json

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt

from lightning_genseg.plots.diagrams import anomaly_histogram, reliability_diagram
from lightning_genseg.plots.pictures import (
    class_legend,
    class_table,
    colorize,
    enlarge,
    grid,
    heat_map,
    indexed,
    outline,
    overlay,
    score_range,
    void_color,
    with_legend,
    with_scale,
)

PALETTE = [(10, 20, 30), (200, 0, 0), (0, 255, 0)]
MASK = np.array([[0, 1, 2], [255, 1, 0]], dtype=np.uint8)


def test_colorize_uses_the_palette_and_black():
    colors = colorize(MASK, PALETTE)
    assert colors.shape == (2, 3, 3)
    assert colors.dtype == np.uint8
    assert colors[0].tolist() == [list(color) for color in PALETTE]
    assert colors[1, 0].tolist() == [0, 0, 0]
    np.testing.assert_array_equal(colorize(MASK.astype(np.int64), PALETTE), colors)


def test_void_has_a_colour_of_its_own():
    black, white, grey = (0, 0, 0), (255, 255, 255), (128, 128, 128)
    for taken in ([], [black], [black, white], [black, white, grey]):
        palette = [*taken, (1, 2, 3)]
        assert void_color(palette) not in palette
        shown = colorize(np.array([[0, 255]]), palette)
        assert tuple(shown[0, 1]) == void_color(palette) == class_legend("ab", palette, [255])[0][1]
        image = indexed(np.array([[0, 255]], np.uint8), palette)
        np.testing.assert_array_equal(np.array(image), [[0, 255]])
        np.testing.assert_array_equal(np.array(image.convert("RGB")), shown)
        assert json.loads(class_table("ab", palette))[-1]["color"] == list(void_color(palette))


def test_what_stands_beside_a_picture():
    picture = np.full((100, 60, 3), 7, np.uint8)
    names = [(f"a class with the number {i}", color) for i, color in enumerate(PALETTE * 5)]
    for drawn in (with_legend(picture, names), with_scale(picture, -1, 3, 2)):
        array = np.array(drawn)
        np.testing.assert_array_equal(array[:, :60], picture)
        assert (array[:, 60:] != 255).any(0).any()
        assert (array[:, -2:] == 255).all()  # nothing is cut off
    assert all((np.array(with_legend(picture, names)) == c).all(-1).any() for c in PALETTE)
    assert with_scale(picture, -1, 3, 2).width > with_scale(picture, -1, 3, 5).width  # named


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


def test_outline_is_inside_a_region_and_black_around_it():
    picture = np.full((8, 9, 3), 100, np.uint8)
    mask = np.zeros((8, 9), bool)
    mask[3:7, 0:5] = True  # at the left edge of the picture
    lines = outline(picture, mask, (200, 10, 10))
    kinds = {(100, 100, 100): ".", (200, 10, 10): "o", (0, 0, 0): "#"}
    drawn = ["".join(kinds[tuple(pixel)] for pixel in row) for row in lines.tolist()]
    assert drawn == [
        ".........",
        ".........",
        "#####....",
        "ooooo#...",
        "....o#...",
        "....o#...",
        "ooooo#...",
        "#####....",
    ]
    assert (picture == 100).all()
    np.testing.assert_array_equal(outline(picture, mask & False), picture)
    with pytest.raises(ValueError, match=r"the image is \(8, 9\) but the mask \(9, 8\)"):
        outline(picture, mask.T)


def near(picture, color, tolerance=30):
    return np.abs(np.asarray(picture).astype(int) - color).max(-1) <= tolerance


def reliability_table(gap):
    share = np.array([0, 1, 2, 3, 4, 10]) / 20
    confidence = (np.arange(6) + 0.5) / 6
    accuracy = np.where(share > 0, np.clip(confidence - gap, 0, 1), np.nan)
    return np.stack([np.where(share > 0, confidence, np.nan), accuracy, share], 1)


def test_reliability_diagram_shows_the_gap():
    red = (200, 68, 47)
    pictures = {gap: reliability_diagram(reliability_table(gap)) for gap in (0, 0.07, -0.07)}
    assert all(picture.size == (500, 600) for picture in pictures.values())
    # Right of the legend, above the shares.
    count = {gap: near(p, red)[40:400, 260:].sum() for gap, p in pictures.items()}
    assert count[0.07] > 2 * count[0] + 300
    assert count[-0.07] > 2 * count[0] + 300
    with pytest.raises(ValueError, match="all bins of the reliability table are empty"):
        reliability_diagram(np.array([[np.nan, np.nan, 0.0]] * 5))


BLUE, ORANGE = (59, 110, 165), (232, 135, 14)


def bars(picture, color):
    """Columns of pixels, below the legend, in which a histogram's outline is seen."""
    return np.flatnonzero(near(picture, color)[150:368, 80:].any(0)) + 80


def test_anomaly_histogram_places_both_kinds():
    scores = np.concatenate([np.linspace(-9, -5, 500), np.linspace(-4, 3, 400), [np.inf, -np.inf]])
    known = np.array([1000] * 500 + [0] * 400 + [1, 1])  # unequal numbers, equal areas
    anomalous = np.array([0] * 500 + [2] * 400 + [0, 0])
    order = np.random.default_rng(0).permutation(len(scores))
    picture = anomaly_histogram(scores[order], known[order], anomalous[order])
    assert picture.size == (640, 440)
    assert bars(picture, BLUE).max() < 330
    assert bars(picture, ORANGE).min() > 300
    # Shares of a kind's own pixels: 80 bars over 12, of which 26.7 share the known, 46.7 the
    # anomalous.
    blue = 370 - near(picture, BLUE)[30:370, 90:250].any(1).argmax() - 30
    orange = 370 - near(picture, ORANGE)[100:370, 350:].any(1).argmax() - 100
    assert blue / orange == pytest.approx(46.7 / 26.7, rel=0.05)

    line = (32, 32, 32)
    drawn = near(anomaly_histogram(scores, known, anomalous, -4.5), line, 10)[200:368, 80:]
    columns = np.flatnonzero(drawn.mean(0) > 0.4) + 80
    assert 270 < columns.mean() < 300
    assert len(columns) <= 3
    for plain in (picture, anomaly_histogram(scores, known, anomalous, np.inf)):
        assert not (near(plain, line, 10)[200:368, 80:].mean(0) > 0.4).any()


def test_anomaly_histogram_keeps_small_bars_visible():
    """999 of 1000 known pixels in one bar: the last one would be a fifth of a pixel high."""
    scores = np.array([0.0, 0.5, 1.0])
    picture = anomaly_histogram(scores, np.array([9960, 40, 0]), np.array([5, 0, 5]))
    assert (np.abs(bars(picture, BLUE) - 350) < 30).any()


def test_anomaly_histogram_of_one_score_and_of_none():
    assert anomaly_histogram(np.array([2.0]), np.array([3]), np.array([4])).size == (640, 440)
    with pytest.raises(ValueError, match="no anomalous pixel has a finite score"):
        anomaly_histogram(np.array([2.0, np.inf]), np.array([3, 0]), np.array([0, 4]))
    with pytest.raises(ValueError, match="no known pixel has a finite score"):
        anomaly_histogram(np.array([2.0]), np.array([0]), np.array([4]))


def test_enlarge_grows_every_label_to_a_disc():
    """Against scipy's exact distances; OpenCV's are off by up to 2 %."""
    mask = np.full((200, 300), 255, np.uint8)
    spots = np.random.default_rng(0).integers(0, (200, 300), (20, 2))
    mask[tuple(spots.T)] = np.arange(20) % 3
    grown = enlarge(mask)
    assert grown.dtype == np.uint8
    distance, (y, x) = distance_transform_edt(mask == 255, return_indices=True)
    near, far = distance <= 3.9, distance > 4.1
    assert (grown[near] != 255).all()
    assert (grown[far] == 255).all()
    assert (grown[near] == mask[y, x][near]).mean() > 0.99  # some pixels are as near to two
    assert (grown[mask != 255] == mask[mask != 255]).all()


def test_enlarge_nothing_and_everything():
    empty = np.full((5, 6), 255)
    np.testing.assert_array_equal(enlarge(empty), empty)
    full = np.arange(30).reshape(5, 6) % 3
    np.testing.assert_array_equal(enlarge(full), full)
    single = np.full((1, 1), 2)
    np.testing.assert_array_equal(enlarge(single), single)
