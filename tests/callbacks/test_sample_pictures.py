import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn

from lightning_genseg import AGMM, GSS, GSSInverse
from lightning_genseg.callbacks import LabelSpreading, MaskigePictures
from lightning_genseg.data import Points, SyntheticScenesDataModule
from lightning_genseg.data.loaders import collate
from lightning_genseg.errors import GenSegError
from lightning_genseg.ops.inference_options import InferenceOptions
from lightning_genseg.plots.pictures import colorize
from tests.callbacks.runs import PixelSegmenter, column, pixels, scenes, trainer
from tests.contract import save
from tests.methods.gss.parts import SMALL


def agmm(num_classes=6, **arguments):
    return AGMM(num_classes, features=nn.Conv2d(3, 8, 3, padding=1), **arguments)


# --- LabelSpreading -------------------------------------------------------------------------


def test_label_spreading_of_agmm(tmp_path):
    data = scenes(sparse=Points(2))
    module = agmm(class_names=data.class_names)
    spreading = LabelSpreading(num_images=2)
    trainer(tmp_path, spreading, val_check_interval=1).fit(module, data)
    folder = tmp_path / "label_spreading"
    assert sorted(p.name for p in folder.iterdir()) == ["step_000001.png", "step_000002.png"]
    first, last = (pixels(path) for path in sorted(folder.iterdir()))
    assert first.shape == last.shape
    assert last.shape[1] == 4 * 320 + 5 * 4
    dataset = data.split_dataset("train", ())
    for i, index in enumerate((0, 3)):
        sample = dataset[index]
        image = sample["image"].mul(255).round().byte().permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(column(first, 0)[i], image)
        labels, mask = column(first, 1)[i], sample["mask"].numpy()
        drawn = (labels == colorize(mask, data.palette)).all(2)
        assert drawn[mask != 255].all()
        strength, likeliest = (x[0].numpy() for x in module.gaussian_map(collate([sample])).max(1))
        expected = colorize(likeliest, data.palette) * strength[..., None]
        np.testing.assert_array_equal(column(last, 2)[i], np.rint(expected).astype(np.uint8))
    assert (first != last).any()  # the map and the prediction
    assert all((a == b).all() for a, b in zip(column(first, 1), column(last, 1), strict=True))


def test_label_spreading_at_the_size_of_inference(tmp_path):
    """A photograph of 12 megapixels would fill the memory, and training sees another scale."""
    spreading = LabelSpreading(1)
    module = agmm(inference=InferenceOptions(short_side=16))
    trainer(tmp_path, spreading).fit(module, scenes(sparse=Points(2)))
    (batch,) = spreading.batches
    assert batch["image"].shape[-2:] == (16, 24)
    assert batch["mask"].shape[-2:] == (16, 24)


def test_label_spreading_of_another_method_has_no_gaussians(tmp_path):
    spreading = LabelSpreading(num_images=9)  # there are four images
    module = PixelSegmenter(anomaly=False)
    trainer(tmp_path, spreading).fit(module, scenes(sparse=Points()))
    picture = pixels(tmp_path / "label_spreading" / "step_000002.png")
    assert picture.shape[1] == 3 * 320 + 4 * 4
    assert 4 * 213 < picture.shape[0] < 4 * 213 + 100


def test_black_is_a_colour_of_label_spreading():
    """VOC's background: seen on white, in the labels and where the Gaussian map has faded."""
    palette = [(0, 0, 0), (128, 0, 0)]
    mask = torch.full((1, 32, 48), 255)
    mask[0, 8, 8], mask[0, 24, 40] = 0, 1
    image = torch.zeros(1, 3, 32, 48)
    image[..., 24:] = 0.5
    batch = {"image": image, "mask": mask, "unlabelled": mask == 255}
    module = agmm(2)
    for colors, void in ((palette, 255), ([(0, 0, 255), *palette[1:]], 0)):
        _, labels, spread, _ = LabelSpreading().row(module, batch, colors).values()
        assert tuple(labels[8, 8]) == colors[0]
        assert tuple(labels[24, 40]) == colors[1]
        assert tuple(labels[30, 2]) == (void // 2,) * 3
        found = module.gaussian_map(batch).max(1)
        strength, likeliest = found.values[0, ..., None].detach().numpy(), found.indices[0].numpy()
        expected = colorize(likeliest, colors) * strength + void * (1 - strength)
        np.testing.assert_allclose(spread, expected, atol=0.51)


# --- MaskigePictures ------------------------------------------------------------------------


def gss_data():
    return SyntheticScenesDataModule(
        size=(48, 64), crop_size=(48, 64), train_length=2, val_length=5, batch_size=2, num_workers=0
    )


@pytest.mark.parametrize("kind", [GSS, GSSInverse])
def test_a_row_of_maskiges_is_what_it_says(kind, tmp_path):
    model = gss = GSS(**SMALL, tokenizer="majority-8")
    if kind is GSSInverse:
        model = GSSInverse(SMALL["num_classes"], save(gss, tmp_path / "gss.ckpt"), width=8)
    trainer(tmp_path, MaskigePictures(2)).fit(model, gss_data())
    picture = pixels(tmp_path / "maskiges" / "step_000001.png")
    assert picture.shape[1] == 6 * 320 + 7 * 4
    # Enlarged pixels stay sharp, and so do the colours: the maskiges hold no other ones.
    colors = {tuple(color) for color in (gss.maskige.colors * 255).round().int().tolist()}
    for index in (2, 3, 4):
        left = 4 + index * 324
        cell = picture[40:200, left + 10 : left + 310].reshape(-1, 3)
        assert set(map(tuple, np.unique(cell, axis=0).tolist())) <= colors
    assert model.training


def test_without_a_datamodule_of_ours_there_is_nothing_to_draw(tmp_path):
    loader = gss_data().plain_loader("val")
    other = pl.LightningDataModule.from_datasets(loader.dataset, loader.dataset)
    message = "MaskigePictures draws samples of a datamodule: pass a SegmentationDataModule"
    for data in ((loader, loader), (other,)):
        with pytest.raises(GenSegError, match=message):
            trainer(tmp_path, MaskigePictures(1)).fit(GSS(**SMALL), *data)


def test_maskiges_are_of_the_size_that_the_network_sees():
    batch = collate([gss_data().split_dataset("val", [])[0]])
    palette = [(0, 0, 0)] * SMALL["num_classes"]
    for options, size in (
        (None, (48, 64)),
        ({"scales": [0.5]}, (24, 32)),
        ({"short_side": 96}, (96, 128)),
    ):
        row = MaskigePictures().row(GSS(**SMALL, inference=options), batch, palette)
        assert [cell.shape[:2] for cell in row.values()][2:] == [size, size, size, (48, 64)]


# --- both -----------------------------------------------------------------------------------


class Foreign(pl.LightningModule):
    def training_step(self, batch, batch_idx):
        return None

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)


@pytest.mark.parametrize(
    ("callback", "module", "sparse", "message"),
    [
        (LabelSpreading, Foreign, Points(), "SegmentationModule predicts and Foreign is none"),
        (LabelSpreading, PixelSegmenter, None, r"the data have none: set data\.sparse"),
        (MaskigePictures, PixelSegmenter, None, "what a GSS predicts and PixelSegmenter is none"),
    ],
)
def test_wrong_use(callback, module, sparse, message, tmp_path):
    with pytest.raises(ValueError, match="num_images is 0; it must be at least 1"):
        callback(num_images=0)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, callback()).fit(module(), scenes(sparse=sparse))
