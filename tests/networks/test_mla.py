import pytest
import torch

from lightning_genseg import TokenDecoderOptions
from lightning_genseg.methods.gss.head import TokenHead
from lightning_genseg.networks.mla import MLADecoder

CHANNELS = (3, 0, 6, 8, 10, 12)


def size(part):
    return sum(p.numel() for p in part.parameters())


def stages(strides=(4, 8, 16, 32), batch=2):
    """Of images of 64 x 96, after the image itself and timm's placeholder."""
    maps = [
        torch.rand(batch, c, 64 // s, 96 // s) for c, s in zip(CHANNELS[2:], strides, strict=True)
    ]
    return [torch.rand(batch, 3, 64, 96), torch.empty(batch, 0, 32, 48), *maps]


@pytest.mark.parametrize("auxiliary", ["separate", "shared", "none"])
@pytest.mark.parametrize("stride", [4, 8])
def test_shapes_and_gradients(auxiliary, stride):
    decoder = MLADecoder(
        CHANNELS, 16, 32, depth=2, stride=stride, auxiliary=auxiliary, num_classes=5
    )
    output = decoder(stages())
    features, scores = output if auxiliary != "none" else (output, None)
    assert features.shape == (2, 32, 64 // stride, 96 // stride)
    loss = features.square().mean()
    if scores is not None:
        assert scores.shape == (2, 5, 64 // stride, 96 // stride)
        loss = loss + scores.square().mean()
    loss.backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_what_the_auxiliary_head_sees():
    shared = MLADecoder(CHANNELS, 16, 32, depth=1, auxiliary="shared", num_classes=5).eval()
    merged = shared.merge(stages()[2:])
    assert merged.shape == (2, 32, 16, 24)
    given = stages()
    _, scores = shared(given)
    torch.testing.assert_close(scores, shared.auxiliary(shared.merge(given[2:])))
    separate = MLADecoder(CHANNELS, 16, 32, depth=1, auxiliary="separate", num_classes=5)
    separate(given)[1].sum().backward()
    assert all(p.grad is None for p in separate.merge.parameters())


def test_a_dilated_encoder():
    """ResNet-101 in the published code: strides 4, 8, 8, 8."""
    decoder = MLADecoder(CHANNELS, 16, 32, depth=0)
    assert decoder(stages((4, 8, 8, 8))).shape == (2, 32, 16, 24)


@pytest.mark.parametrize(
    ("channels", "depth", "millions"),
    [
        ((192, 384, 768, 1536), 2, 23.9),  # Swin-L
        ((256, 512, 1024, 2048), 6, 32.7),  # ResNet-101
        ((48, 96, 192, 384), 6, 31.5),  # HRNet-W48
    ],
)
def test_published_sizes(channels, depth, millions):
    """With the token head on top."""
    with torch.device("meta"):
        parts = MLADecoder(channels, depth=depth), TokenHead(8192, TokenDecoderOptions())
    assert sum(map(size, parts)) / 1e6 == pytest.approx(millions, abs=0.06)


def test_published_size_of_the_auxiliary_branch():
    with torch.device("meta"):
        both = MLADecoder((192, 384, 768, 1536), auxiliary="separate", num_classes=150)
        alone = MLADecoder((192, 384, 768, 1536))
    assert (size(both) - size(alone)) / 1e6 == pytest.approx(1.76, abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoder_channels": (3, 0, 6, 8, 10)}, "four stages and the encoder has the channels"),
        ({"auxiliary": "shared"}, "predicts classes: give it num_classes"),
        ({"auxiliary": "both"}, "auxiliary is 'both'; it must be one of separate, shared, none"),
        ({"stride": 2}, "stride is 2; it must be one of 4, 8"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MLADecoder(**{"encoder_channels": CHANNELS, **arguments})
