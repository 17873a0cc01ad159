import pytest
import torch

from lightning_genseg.networks import PixelFeatures
from lightning_genseg.networks.fcn import FCNDecoder


def test_sizes_of_the_published_head():
    decoder = FCNDecoder([3, 64, 256, 512, 1024, 2048])
    # Weights of mmsegmentation's FCN-D8 head on ResNet-101 without its classifier: three 3x3
    # convolutions without bias and their normalisations.
    expected = 9 * 512 * (2048 + 512 + 2048 + 512) + 3 * 2 * 512
    assert sum(p.numel() for p in decoder.parameters()) == expected


def test_the_encoder_is_dilated_to_stride_8_unless_asked_otherwise():
    image = torch.rand(2, 3, 64, 64)
    assert PixelFeatures("resnet18", "fcn").encoder(image)[-1].shape[-1] == 8
    coarse = PixelFeatures("vgg11", "fcn", options={"encoder_output_stride": 32})
    assert coarse.stride == 32
    assert coarse(image).shape == (2, 512, 2, 2)


def test_every_image_position_sees_only_its_neighbourhood():
    decoder = FCNDecoder([4], decoder_channels=8).eval()
    stage = torch.randn(1, 4, 16, 16, requires_grad=True)
    decoder([stage])[0, :, 8, 8].sum().backward()
    seen = stage.grad[0].abs().sum(0) > 0
    # Three 3x3 convolutions reach three pixels far.
    assert seen.nonzero().min(0).values.tolist() == [5, 5]
    assert seen.nonzero().max(0).values.tolist() == [11, 11]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_drops_whole_channels_in_training_only(dropout):
    decoder = FCNDecoder([4], decoder_channels=64, dropout=dropout)
    stage = torch.randn(2, 4, 16, 16)
    dead = (decoder([stage]) == 0).all(-1).all(-1).float().mean()
    assert (dead > 0.3) if dropout else (dead < 0.1)
    decoder.eval()
    torch.testing.assert_close(decoder([stage]), decoder([stage]))
