import pytest
import timm
import torch

from lightning_genseg.errors import GenSegError
from lightning_genseg.networks import PixelFeatures
from lightning_genseg.networks.hypercolumns import HypercolumnDecoder


def test_every_stage_counts_alike():
    stages = [torch.randn(1, 4, 16, 16), 50 * torch.randn(1, 6, 8, 8), torch.randn(1, 8, 4, 4)]
    columns = HypercolumnDecoder([4, 6, 8], levels=2)(stages)
    assert columns.shape == (1, 14, 8, 8)
    torch.testing.assert_close(columns[:, :6].norm(dim=1), torch.ones(1, 8, 8))
    deep = columns[..., 0, 0][:, 6:]  # a corner is its cell's: nothing lies beyond
    torch.testing.assert_close(deep, stages[2][..., 0, 0] / stages[2][..., 0, 0].norm())


def test_nothing_to_train():
    features = PixelFeatures("tu-test_resnet", "hypercolumns", options={"levels": 2})
    assert not list(features.decoder.parameters())
    assert features.stride == 16


def test_a_vision_transformer(tmp_path):
    """Its stages have one size, images may have any, and weights come from timm's own file."""
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pth")
    options = {"levels": 2, "encoder_depth": 3}
    features = PixelFeatures("tu-test_vit", "hypercolumns", tmp_path / "vit.pth", options=options)
    assert features.stride == 16
    assert features.eval()(torch.rand(1, 3, 64, 90)).shape == (1, 2 * 64, 4, 6)


@pytest.mark.parametrize("levels", [0, 7])
def test_as_many_stages_as_there_are(levels):
    with pytest.raises(GenSegError, match="levels"):
        HypercolumnDecoder([4, 6, 8], levels=levels)
