import numpy as np
import pytest
from PIL import Image

from lightning_genseg import GSS, SoftmaxSegmenter
from lightning_genseg.callbacks import MaskigePictures
from lightning_genseg.callbacks.maskiges import _row
from lightning_genseg.data import SyntheticScenesDataModule
from lightning_genseg.data.loaders import collate
from lightning_genseg.plots.pictures import grid
from tests.contract import TINY, trainer
from tests.methods.gss.test_module import FROZEN, SMALL


def data():
    return SyntheticScenesDataModule(
        size=(48, 64), crop_size=(48, 64), train_length=2, val_length=5, batch_size=2, num_workers=0
    )


@pytest.mark.filterwarnings(FROZEN)
def test_a_row_is_what_it_says(tmp_path):
    model = GSS(**SMALL, tokenizer="majority-8")
    run = trainer(tmp_path, callbacks=[MaskigePictures(2)])
    run.fit(model, data())
    picture = np.asarray(Image.open(tmp_path / "maskiges" / "step_000001.png"))
    row = [np.zeros((48, 64, 3), np.uint8)] * 6
    assert picture.shape[1] == grid([row]).width
    # Enlarged pixels stay sharp, and so do the colours: the third, fourth and fifth column hold no
    # other ones.
    colors = {tuple(color) for color in (model.maskige.colors * 255).round().int().tolist()}
    for column in (2, 3, 4):
        left = 4 + column * 324
        cell = picture[40:200, left + 10 : left + 310].reshape(-1, 3)
        assert set(map(tuple, np.unique(cell, axis=0).tolist())) <= colors
    assert model.training


def test_maskiges_are_of_the_size_that_the_network_sees(tmp_path):
    batch = collate([data().split_dataset("val", [])[0]])
    drawn = {}
    for options in (None, {"scales": [0.5]}, {"short_side": 96}):
        row = _row(GSS(**SMALL, inference=options), batch, [(0, 0, 0)] * SMALL["num_classes"])
        drawn[str(options)] = [cell.shape[:2] for cell in row[2:5]]
        assert row[5].shape[:2] == (48, 64)
    assert list(drawn.values()) == [[(48, 64)] * 3, [(24, 32)] * 3, [(96, 128)] * 3]


def test_wrong_use(tmp_path):
    with pytest.raises(ValueError, match="num_images is 0 but must be 1 or more"):
        MaskigePictures(0)
    with pytest.raises(ValueError, match="draws what a GSS predicts and SoftmaxSegmenter is none"):
        trainer(tmp_path, callbacks=[MaskigePictures()]).fit(SoftmaxSegmenter(**TINY), data())
