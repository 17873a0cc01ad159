import pytest
import torch

from lightning_genseg.networks import PixelFeatures
from lightning_genseg.networks.deeplab import DeepLabDecoder


def test_sizes_of_the_authors_decoder():
    decoder = DeepLabDecoder([3, 128, 256, 512, 1024, 2048])
    # Two full 3x3 convolutions over 256 + 48 and 256 channels, and their normalisations.
    fuse = 9 * 256 * (304 + 256) + 2 * 2 * 256
    assert sum(p.numel() for p in decoder.fuse.parameters()) == fuse
    pyramid = 256 * 2048 * (1 + 3 * 9 + 1) + 5 * 2 * 256
    assert sum(p.numel() for p in decoder.pyramid.parameters()) == pyramid
    rest = 5 * 256 * 256 + 2 * 256 + 48 * 256 + 2 * 48
    assert sum(p.numel() for p in decoder.parameters()) == fuse + pyramid + rest


def test_stem_and_strides_of_the_authors_network():
    features = PixelFeatures("tu-resnet50s", "deeplabv3plus_full", options={"decoder_channels": 8})
    stem = [m.out_channels for m in features.encoder.modules() if isinstance(m, torch.nn.Conv2d)]
    assert stem[:3] == [64, 64, 128]
    with torch.no_grad():
        assert features.encoder(torch.rand(1, 3, 64, 64))[-1].shape[-1] == 8
    assert features.stride == 4


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_whole_channels_are_dropped_while_training(dropout):
    decoder = DeepLabDecoder([3, 4, 4, 4], decoder_channels=64, dropout=dropout)
    project = decoder.project(torch.randn(2, 320, 16, 16))
    dead = (project == 0).all(-1).all(-1).float().mean()
    assert (dead > 0.3) if dropout else (dead < 0.1)


def test_one_image_cannot_train_it():
    with pytest.raises(ValueError, match="cannot train on one image"):
        PixelFeatures("tu-test_resnet", "deeplabv3plus_full")(torch.rand(1, 3, 64, 64))
