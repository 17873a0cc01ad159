import pytest
import torch
from torch.nn import functional as F

from lightning_genseg.errors import GenSegError
from lightning_genseg.networks import PixelFeatures
from lightning_genseg.networks.ocrnet import ObjectAttention, OCRDecoder, gather_regions


def test_features_and_coarse_scores():
    features = PixelFeatures("tu-test_resnet", "ocrnet", num_classes=5)
    output, scores = features.extract(torch.randn(2, 3, 67, 93))
    assert output.shape == (2, 512, 17, 24)
    assert scores is not None
    assert scores.shape == (2, 5, 17, 24)
    (output.square().mean() + features.auxiliary_weight * scores.square().mean()).backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() for p in features.decoder.parameters()
    )


def test_options():
    options = {"decoder_channels": 32, "key_channels": 16}
    features = PixelFeatures("tu-test_resnet", "ocrnet", num_classes=5, options=options)
    assert features.out_channels == 32
    with pytest.raises(GenSegError, match="encoder_depth of at least 2"):
        PixelFeatures("tu-test_resnet", "ocrnet", num_classes=5, options={"encoder_depth": 1})


def test_regions_are_means_of_the_pixels_that_score_high():
    labels = torch.randint(0, 4, (2, 6, 7))
    pixels = torch.randn(2, 8, 6, 7)
    scores = 100.0 * F.one_hot(labels, 4).permute(0, 3, 1, 2)
    regions = gather_regions(pixels, scores)
    assert regions.shape == (2, 8, 4, 1)
    for b in range(2):
        for c in range(4):
            expected = pixels[b][:, labels[b] == c].mean(dim=1)
            torch.testing.assert_close(regions[b, :, c, 0], expected, rtol=1e-4, atol=1e-5)


def test_regions_stay_exact_under_autocast():
    # 100 x 100 equal weights: 1e-4 each, whose sum in bfloat16 would not come near 1.
    pixels = 1 + 0.1 * torch.randn(1, 4, 100, 100)
    with torch.autocast("cpu", torch.bfloat16):
        regions = gather_regions(pixels, torch.zeros(1, 3, 100, 100))
    assert regions.dtype == torch.float32
    torch.testing.assert_close(regions[0, :, 0, 0], pixels.mean(dim=(0, 2, 3)), rtol=1e-5, atol=0)


def test_attention_equals_the_library_one():
    attention = ObjectAttention(8, 4).eval()
    pixels, regions = torch.randn(2, 8, 5, 6), torch.randn(2, 8, 3, 1)
    query = attention.query(pixels).flatten(2).transpose(1, 2)
    key = attention.key(regions).flatten(2).transpose(1, 2)
    value = attention.value(regions).flatten(2).transpose(1, 2)
    context = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    expected = attention.out(context.reshape(2, 4, 5, 6))
    torch.testing.assert_close(attention(pixels, regions), expected)
    mirrored = attention(pixels.flip(-1), regions).flip(-1)  # no pixel knows where it is
    torch.testing.assert_close(mirrored, expected)


def test_widths_of_the_hrnet_configuration():
    decoder = OCRDecoder([3, 64, 48, 96, 192, 384], num_classes=19)
    assert decoder.coarse[0][0].weight.shape == (720, 720, 1, 1)
    assert decoder.pixels[0].weight.shape == (512, 720, 3, 3)
    assert decoder.attention.query[1][0].weight.shape == (256, 256, 1, 1)
    assert decoder.fuse[0].weight.shape == (512, 1024, 1, 1)


@pytest.mark.slow
def test_hrnet_branches_through_timm():
    features = PixelFeatures(
        "tu-hrnet_w18_small", "ocrnet", num_classes=5, options={"feature_location": ""}
    )
    assert features.decoder.coarse[0][0].weight.shape[1] == 16 + 32 + 64 + 128
    assert features(torch.rand(2, 3, 50, 70)).shape == (2, 512, 13, 18)
