import random

import pytest
import torch
from torch.nn import functional as F

from lightning_genseg.ops.inference_options import check_options, input_size
from lightning_genseg.ops.views import (
    infer,
    infer_once,
    infer_rows,
    merge_rows,
    pad_to_multiple,
    softmax,
    window_positions,
)


def pointwise(image):
    """Four scores per pixel that look at that pixel only."""
    return torch.cat([image, image.square().sum(dim=1, keepdim=True)], dim=1)


def blurred(image):
    """Scores that also see their neighbours: windows change them."""
    return F.avg_pool2d(pointwise(image), 5, stride=1, padding=2)


@pytest.fixture
def image():
    return torch.randn(2, 3, 37, 53)


def test_without_options_the_raw_scores_come_back(image):
    for options in (None, {}, {"flip": False}, {"scales": [1.0]}):
        assert torch.equal(infer(blurred, image, options), blurred(image))


@pytest.mark.parametrize(
    ("window", "stride"),
    [((16, 16), (16, 16)), ((20, 31), (7, 10)), ((64, 20), (64, 11)), ((1, 1), (1, 1))],
)
def test_windows_equal_the_whole_for_pointwise_scores(image, window, stride):
    scores = infer(pointwise, image, {"window": window, "stride": stride})
    torch.testing.assert_close(scores, pointwise(image))


def test_overlapping_windows_are_averaged_on_raw_scores():
    calls = []

    def forward(crop):
        calls.append(tuple(crop.shape[-2:]))
        return torch.full((1, 2, *crop.shape[-2:]), float(len(calls)))

    scores = infer(forward, torch.zeros(1, 3, 4, 10), {"window": (4, 6), "stride": (4, 4)})
    assert calls == [(4, 6), (4, 6)]
    assert scores[0, 0, 0].tolist() == [1.0] * 4 + [1.5] * 2 + [2.0] * 4


def test_an_image_smaller_than_the_window_is_run_whole(image):
    seen = []

    def forward(crop):
        seen.append(tuple(crop.shape[-2:]))
        return blurred(crop)

    options = {"window": (64, 64), "stride": (32, 32)}
    assert torch.equal(infer(forward, image, options), blurred(image))
    assert seen == [(37, 53)]
    seen.clear()
    infer(forward, image, {"window": (64, 32), "stride": (32, 32)})
    assert seen == [(37, 32), (37, 32)]


@pytest.mark.parametrize(
    ("options", "exact"),
    [
        ({}, True),
        ({"flip": True}, False),
        ({"window": (16, 16), "stride": (16, 16)}, True),
        ({"window": (20, 31), "stride": (7, 10), "flip": True}, False),
        ({"window": (64, 20), "stride": (64, 11)}, True),
        ({"window": (20, 31), "stride": (7, 10)}, True),
        ({"short_side": 20}, False),
        ({"short_side": 50, "window": (16, 16), "stride": (9, 16)}, False),
        ({"scales": [0.5, 1.0, 1.5], "window": (20, 20), "stride": (9, 11), "flip": True}, False),
    ],
)
@pytest.mark.parametrize("most", [1, 5, 64])
def test_pieces_of_rows_are_the_whole(image, options, exact, most):
    whole = infer(blurred, image, options)
    pieces = list(infer_rows(blurred, image, options, most=most))
    assert max(part.shape[-2] for _, part in pieces) <= most
    assert [row for rows, _ in pieces for row in range(rows.start, rows.stop)] == list(range(37))
    merged = merge_rows(pieces, 37)
    if exact:
        assert torch.equal(merged, whole)
    torch.testing.assert_close(merged, whole)


def test_bytes_are_images_too(image):
    picture = (image * 255).byte()
    options = {"window": (20, 31), "stride": (7, 10), "flip": True}
    expected = infer(blurred, picture.float() / 255, options)
    assert torch.equal(infer(blurred, picture, options), expected)


def test_windows_cover_everything_and_stay_inside():
    rng = random.Random(0)
    for _ in range(500):
        size = (rng.randint(1, 60), rng.randint(1, 60))
        window = (rng.randint(1, 70), rng.randint(1, 70))
        stride = (rng.randint(1, window[0]), rng.randint(1, window[1]))
        count = torch.zeros(size, dtype=torch.int64)
        seen = set()
        for rows, columns in window_positions(size, window, stride):
            assert 0 <= rows.start < rows.stop <= size[0]
            assert 0 <= columns.start < columns.stop <= size[1]
            assert rows.stop - rows.start == min(window[0], size[0])
            assert columns.stop - columns.start == min(window[1], size[1])
            seen.add((rows.start, columns.start))
            count[rows, columns] += 1
        assert count.min() >= 1
        # As many as mmsegmentation's grid, and none twice.
        grid = [
            max(n - w + s - 1, 0) // s + 1 for n, w, s in zip(size, window, stride, strict=True)
        ]
        assert len(seen) == grid[0] * grid[1]


def test_flip_averages_the_probabilities_of_both_views(image):
    def lopsided(crop):
        ramp = torch.linspace(-3, 3, crop.shape[-1])
        return pointwise(crop) + torch.stack([ramp, -ramp, 0 * ramp, ramp])[:, None]

    scores = infer(lopsided, image, {"flip": True})
    expected = (softmax(lopsided(image)) + softmax(lopsided(image.flip(-1)).flip(-1))) / 2
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(infer(lopsided, image.flip(-1), {"flip": True}), scores.flip(-1))
    torch.testing.assert_close(scores.sum(dim=1), torch.ones(2, 37, 53))


def test_flip_changes_nothing_for_a_symmetric_network(image):
    scores = infer(blurred, image, {"flip": True})
    torch.testing.assert_close(scores, softmax(blurred(image)))


def test_scales_are_resized_back_and_averaged(image):
    def at(scale):
        size = (int(37 * scale + 0.5), int(53 * scale + 0.5))
        scores = blurred(F.interpolate(image, size, mode="bilinear"))
        return F.interpolate(scores, (37, 53), mode="bilinear")

    torch.testing.assert_close(infer(blurred, image, {"scales": [0.5]}), at(0.5))
    expected = (softmax(at(0.5)) + softmax(at(1.0)) + softmax(at(1.75))) / 3
    torch.testing.assert_close(infer(blurred, image, {"scales": [0.5, 1.0, 1.75]}), expected)


def test_scales_leave_a_constant_image_alone():
    image = torch.full((1, 3, 20, 30), 0.3)
    options = {"scales": [0.5, 1.0, 1.5], "flip": True, "window": (8, 8), "stride": (5, 5)}
    torch.testing.assert_close(infer(pointwise, image, options), softmax(pointwise(image)))


def test_everything_at_once_sees_windows_of_the_scaled_image():
    seen = []

    def forward(crop):
        seen.append(tuple(crop.shape[-2:]))
        return pointwise(crop)

    options = {"scales": [1.0, 2.0], "flip": True, "window": (16, 16), "stride": (16, 16)}
    scores = infer(forward, torch.rand(1, 3, 16, 24), options)
    assert scores.shape == (1, 4, 16, 24)
    assert len(seen) == 2 * (2 + 2 * 3)
    assert set(seen) == {(16, 16)}


@pytest.mark.parametrize(
    ("size", "options", "scale", "expected"),
    [
        # ADE20K's smallest and largest kinds; the sizes that mmcv's rescale_size gives for (2048,
        # 512).
        ((256, 341), {"short_side": 512}, 1.0, (512, 682)),
        ((683, 512), {"short_side": 512}, 1.0, (683, 512)),
        ((2100, 2100), {"short_side": 512}, 1.0, (512, 512)),
        ((480, 640), {"short_side": 512}, 1.0, (512, 683)),
        ((480, 640), {"short_side": 512, "long_side": 2048}, 1.0, (512, 683)),
        ((100, 800), {"short_side": 512}, 1.0, (512, 4096)),
        ((100, 800), {"short_side": 512, "long_side": 2048}, 1.0, (256, 2048)),
        ((800, 100), {"short_side": 512, "long_side": 2048}, 1.0, (2048, 256)),
        # Factors apply to both limits: (2048, 512) times 0.5 is (1024, 256).
        ((480, 640), {"short_side": 512, "long_side": 2048}, 0.5, (256, 341)),
        ((480, 640), {"short_side": 512, "long_side": 2048}, 1.75, (896, 1195)),
        ((100, 800), {"short_side": 512, "long_side": 2048}, 1.5, (384, 3072)),
        # ResizeToMultiple with a size_divisor of 32.
        ((480, 640), {"short_side": 512, "multiple": 32}, 1.0, (512, 704)),
        ((480, 640), {"short_side": 512, "multiple": 32}, 0.5, (256, 352)),
        ((37, 53), {"multiple": 32}, 1.0, (64, 64)),
        ((37, 53), {"multiple": 1}, 1.0, (37, 53)),
        # Half a pixel counts as one, and nothing vanishes.
        ((37, 53), {}, 0.5, (19, 27)),
        ((1, 9), {}, 0.01, (1, 1)),
        ((37, 53), {"short_side": None, "long_side": None, "multiple": None}, 1.0, (37, 53)),
    ],
)  # fmt: skip
def test_sizes_computed_by_hand(size, options, scale, expected):
    assert input_size(size, options, scale) == expected


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({"short_side": 48}, [(48, 69)]),
        ({"short_side": 48, "long_side": 60}, [(42, 60)]),
        ({"short_side": 48, "multiple": 32}, [(64, 96)]),
        ({"short_side": 20, "scales": [0.5, 2.0]}, [(10, 14), (40, 57)]),
        ({"short_side": 20, "scales": [0.5, 2.0], "flip": True}, [(10, 14)] * 2 + [(40, 57)] * 2),
        ({"short_side": 48, "window": (48, 48), "stride": (32, 32)}, [(48, 48)] * 2),
        ({"short_side": 48, "window": (96, 96), "stride": (32, 32)}, [(48, 69)]),
    ],
)
def test_scores_of_a_resized_image_have_the_original_size(image, options, seen):
    calls = []

    def forward(crop):
        calls.append(tuple(crop.shape[-2:]))
        return blurred(crop)

    assert infer(forward, image, options).shape == (2, 4, 37, 53)
    assert calls == seen


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"short_side": 48},
        {"short_side": 20, "margin": 7},
        {"short_side": 48, "long_side": 60, "multiple": 32},
        {"margin": 100},  # more than there is to mirror
    ],
)
@pytest.mark.parametrize("size", [(37, 53), (53, 37), (1, 9)])
def test_what_a_graph_does_is_the_same(options, size):
    image = torch.rand(2, 3, *size)
    expected = infer(blurred, image, options)
    found = infer_once(lambda x: {"scores": blurred(x)}, image, {**options, "flip": True})
    torch.testing.assert_close(found["scores"], expected)


def test_a_resized_image_is_predicted_as_if_it_came_so(image):
    larger = F.interpolate(image, (48, 69), mode="bilinear")
    expected = F.interpolate(blurred(larger), (37, 53), mode="bilinear")
    torch.testing.assert_close(infer(blurred, image, {"short_side": 48}), expected)
    options = {"short_side": 48, "scales": [1.0, 1.5], "flip": True}
    largest = F.interpolate(image, (72, 103), mode="bilinear")
    views = [
        softmax(F.interpolate(scores, (37, 53), mode="bilinear"))
        for x in (larger, largest)
        for scores in (blurred(x), blurred(x.flip(-1)).flip(-1))
    ]
    torch.testing.assert_close(infer(blurred, image, options), sum(views) / 4)


@pytest.mark.parametrize("options", [{}, {"flip": True}, {"short_side": 40, "scales": [1.0, 1.5]}])
def test_a_margin_of_mirror_images_hides_the_border(image, options):
    """A network that pads with zeros is constant on a constant image only far from the border."""
    kernel = torch.ones(1, 3, 9, 9) / 243

    def network(x):
        score = torch.nn.functional.conv2d(x, kernel, padding=4)
        return torch.cat([score, -score], 1)

    constant = torch.full_like(image, 0.5)
    plain, hidden = (
        infer(network, constant, {**options, "margin": margin}, None) for margin in (0, 4)
    )
    assert plain.shape == hidden.shape
    assert plain[0, 0, 0, 0] < 0.3
    torch.testing.assert_close(hidden[:, :1], constant[:, :1])
    narrow = image[..., :3, :]  # which cannot be continued by more than two rows
    assert infer(network, narrow, {"margin": 9}).shape[-2:] == narrow.shape[-2:]


def test_a_margin_is_at_most_what_there_is_to_mirror(image):
    seen = []

    def forward(x):
        seen.append(tuple(x.shape[-2:]))
        return {"scores": x}

    infer(forward, image, {"margin": 40}, {})
    infer_once(forward, image, {"margin": 40})
    assert seen == [(37 + 2 * 36, 53 + 2 * 40)] * 2


def test_cityscapes_slides_eight_windows_over_a_frame():
    """768 x 768 every 512 pixels over 1024 x 2048, the last ones moved back to the edge."""
    found = window_positions((1024, 2048), (768, 768), (512, 512))
    corners = [(rows.start, columns.start) for rows, columns in found]
    assert corners == [(top, left) for top in (0, 256) for left in (0, 512, 1024, 1280)]


def test_another_activation(image):
    views = (blurred(image), blurred(image.flip(-1)).flip(-1))
    raw = infer(blurred, image, {"flip": True}, activation=None)
    torch.testing.assert_close(raw, sum(views) / 2)
    sigmoid = infer(blurred, image, {"flip": True}, activation=torch.sigmoid)
    torch.testing.assert_close(sigmoid, sum(view.sigmoid() for view in views) / 2)


def test_several_maps_are_averaged_key_by_key(image):
    def forward(crop):
        return {"scores": blurred(crop), "anomaly": blurred(crop)[:, :1]}

    options = {"flip": True, "scales": [1.0, 0.5], "window": (20, 20), "stride": (10, 10)}
    maps = infer(forward, image, options, activation={"scores": softmax, "anomaly": None})
    torch.testing.assert_close(maps["scores"], infer(blurred, image, options))
    alone = infer(lambda crop: blurred(crop)[:, :1], image, options, activation=None)
    torch.testing.assert_close(maps["anomaly"], alone)
    single = infer(forward, image, None, activation={})
    assert torch.equal(single["scores"], blurred(image))


def test_an_activation_of_the_wrong_kind_is_refused(image):
    with pytest.raises(ValueError, match="activation must be a function where"):
        infer(lambda crop: {"scores": blurred(crop)}, image)
    with pytest.raises(ValueError, match="activation must be a function where"):
        infer(blurred, image, activation={"scores": softmax})


@pytest.mark.parametrize("options", [None, {"window": (16, 16), "stride": (16, 16)}])
def test_scores_of_another_size_are_refused(image, options):
    with pytest.raises(ValueError, match=r"its input's size, B x C x \d+ x \d+, but its output is"):
        infer(lambda crop: crop[..., ::2, ::2], image, options)
    with pytest.raises(ValueError, match="but anomaly is"):
        infer(lambda crop: {"anomaly": crop.mean(dim=1)}, image, options, activation=None)


def test_half_precision_windows_are_summed_in_float32():
    def forward(crop):
        return torch.full((1, 1, *crop.shape[-2:]), 1.01).bfloat16()

    image = torch.zeros(1, 3, 400, 4)
    scores = infer(forward, image, {"window": (400, 4), "stride": (1, 1)})
    assert scores.dtype == torch.bfloat16  # one window: untouched
    scores = infer(forward, image, {"window": (300, 4), "stride": (1, 4)})
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.full_like(scores, 1.0078125))


def test_autocast(image):
    conv = torch.nn.Conv2d(3, 5, 3, padding=1)
    options = {"flip": True, "scales": [1.0, 1.5], "window": (20, 20), "stride": (16, 16)}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scores = infer(conv, image, options)
    assert scores.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(scores, infer(conv, image, options), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windw": (8, 8)}, "inference.windw is not an option; did you mean window"),
        ({"tta": True}, "inference.tta is not an option; known are short_side, long_side"),
        ({"window": 8, "stride": (8, 8)}, "inference.window is 8; it must be a list"),
        ({"window": (8, 0), "stride": (8, 8)}, "inference.window is 0; it must be at least 1"),
        ({"window": (8, 8), "stride": (8, -1)}, "inference.stride is -1; it must be at least 1"),
        ({"window": (8, 8), "stride": (8.0, 8)}, "inference.stride is 8.0; .* whole number"),
        ({"window": (8, 8), "stride": (True, 8)}, "inference.stride is True; .* whole number"),
        ({"window": (8, 8, 8), "stride": (8, 8)}, "inference.window .* must have 2 entries"),
        ({"window": (8, 8)}, "inference.window needs inference.stride"),
        ({"stride": (8, 8)}, "inference.stride needs inference.window"),
        ({"window": (8, 8), "stride": (8, 9)}, r"inference.stride \(8, 9\) is larger than"),
        ({"scales": []}, "inference.scales is empty"),
        ({"scales": [1.0, 0.0]}, "inference.scales is 0.0; it must be positive"),
        ({"scales": [float("nan")]}, "inference.scales is nan"),
        ({"scales": [float("inf")]}, "inference.scales is inf"),
        ({"scales": [True]}, "inference.scales is True; it must be a number"),
        ({"scales": 1.0}, "inference.scales is 1.0; it must be a list"),
        ({"short_side": 0}, "inference.short_side is 0; it must be at least 1"),
        ({"short_side": 512.0}, "inference.short_side is 512.0; .* whole number"),
        ({"short_side": 5, "long_side": True}, "inference.long_side is True"),
        ({"multiple": -32}, "inference.multiple is -32"),
        ({"long_side": 2048}, "inference.long_side limits .* give that as well"),
        ({"short_side": 9, "long_side": 8}, "long_side 8 is smaller than inference.short_side 9"),
        ({"flip": "yes"}, "inference.flip is 'yes'; it must be true or false"),
    ],
)
def test_bad_options(image, options, message):
    with pytest.raises(ValueError, match=message):
        check_options(options)
    with pytest.raises(ValueError, match=message):
        infer(pointwise, image, options)


def test_good_options():
    check_options(None)
    check_options({"window": [512, 512], "stride": [341, 341], "scales": [1, 1.5], "flip": True})
    check_options({"short_side": 512, "long_side": 2048, "multiple": 32})
    check_options({"short_side": None, "long_side": None, "multiple": None})
    check_options({"window": None, "stride": None, "scales": None, "flip": None})


def test_pad_to_multiple():
    image = torch.rand(1, 3, 33, 64) + 1
    padded = pad_to_multiple(image, 32)
    assert padded.shape == (1, 3, 64, 64)
    assert torch.equal(padded[..., :33, :], image)
    assert padded[..., 33:, :].abs().sum() == 0
    assert pad_to_multiple(image[..., :32, :], 32).shape == (1, 3, 32, 64)
    assert pad_to_multiple(image, 32, minimum=128).shape == (1, 3, 128, 128)
