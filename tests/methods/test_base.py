"""What the base gives to every method: scores of the whole set, checkpoints, sentences."""

from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from PIL import Image
from torch.utils.data import DataLoader

from lightning_genseg import EMOptions, GMMHead, GMMSeg, SegmentationModule, SoftmaxSegmenter
from lightning_genseg.arguments import check_device
from lightning_genseg.errors import GenSegError, MissingFileError
from lightning_genseg.metrics import CalibrationError
from lightning_genseg.uncertainty import Threshold
from tests.contract import (
    NUM_CLASSES,
    TINY,
    PlainFeatures,
    batch_of,
    in_groups,
    loader,
    save,
    scenes,
    trainer,
)


def make(**arguments: Any) -> SoftmaxSegmenter:
    return SoftmaxSegmenter(NUM_CLASSES, features=PlainFeatures(), **arguments)


def test_logged_scores_are_those_of_the_whole_set(tmp_path):
    names = ["sky", "the ground", "building", "tree", "vehicle", "person"]
    model = make(class_names=names)
    run = trainer(tmp_path)
    result = run.test(model, loader(6), verbose=False)[0]
    prediction = torch.cat([p["mask"] for p in run.predict(model, loader(6))])
    mask = torch.stack([sample["mask"] for sample in scenes()[:6]])
    labelled = mask != 255
    expected = {}
    for index, name in enumerate(names):
        both = ((prediction == index) & (mask == index)).sum()
        either = (((prediction == index) | (mask == index)) & labelled).sum()
        expected[name] = (both / either).item()
    present = [value for value in expected.values() if value == value]
    assert result["test_mIoU"] == pytest.approx(sum(present) / len(present))
    assert result["test_IoU_the_ground"] == pytest.approx(expected["the ground"], nan_ok=True)
    accuracy = (prediction == mask)[labelled].float().mean().item()
    assert result["test_pixel_accuracy"] == pytest.approx(accuracy)


@pytest.mark.parametrize("inference", [None, {"flip": True}, {"scales": [0.5, 1.0]}])
def test_the_calibration_error_is_that_of_the_probabilities(tmp_path, inference):
    model = make(inference=inference)
    result = trainer(tmp_path).test(model, loader(6), verbose=False)[0]
    error = CalibrationError()
    for sample in scenes()[:6]:
        with torch.no_grad():
            scores = model.eval().predict_maps(sample["image"][None])["scores"]
        error.update(scores if inference else scores.softmax(1), sample["mask"][None])
    assert result["test_ECE"] == pytest.approx(error.compute().item(), abs=1e-5)


def test_training_forgets_thresholds_of_other_weights(tmp_path):
    model = make()
    model.anomaly.thresholds["energy"] = Threshold(0.0, 0.05, "pixel", 0.05, 100)
    trainer(tmp_path).fit(model, loader(4), loader(4))
    assert not model.anomaly.thresholds


def test_labels_may_be_larger_than_the_image(tmp_path):
    """Scores are those at the size of the mask, where the images were made smaller."""
    samples = [{**sample, "image": sample["image"][:, ::2, ::2]} for sample in scenes()[:2]]
    data = torch.utils.data.DataLoader(samples, batch_size=2)
    result = trainer(tmp_path).validate(make(), data, verbose=False)[0]
    assert 0 <= result["val_mIoU"] <= 1
    assert make().validation_step(next(iter(data)), 0)["mask"].shape == (2, 48, 64)


@pytest.mark.parametrize("method", [SoftmaxSegmenter, GMMSeg])
def test_bytes_are_images_too(method):
    batch, model = batch_of(), method(**TINY).eval()
    image = (255 * batch["image"]).round().to(torch.uint8)
    mine, theirs = (
        model.compute_loss({**batch, "image": one})["loss"] for one in (image, image.float() / 255)
    )
    assert torch.equal(mine, theirs)


def test_batches_of_another_form_are_refused(tmp_path):
    pair = DataLoader([(torch.rand(3, 32, 48), torch.zeros(32, 48, dtype=torch.long))] * 2)
    unnamed = DataLoader([{"image": torch.rand(3, 32, 48)}] * 2)
    for batches, told in ((pair, "is list"), (unnamed, "has no mask")):
        sentence = f"a batch {told}, and SoftmaxSegmenter needs a dictionary with image, mask: "
        with pytest.raises(GenSegError, match=sentence):
            trainer(tmp_path).fit(make(), batches, batches)
        for step in (trainer(tmp_path).validate, trainer(tmp_path).test):
            with pytest.raises(GenSegError, match=sentence):
                step(make(), batches)


def test_batches_with_wrong_values_are_refused(tmp_path):
    image, mask = torch.rand(2, 3, 32, 48), torch.zeros(2, 32, 48, dtype=torch.long)
    mask[:, 0] = 255
    for change, sentence in (
        ({"image": 255 * image}, "the image of a batch has values from 0"),
        ({"image": image - 0.5}, "the image of a batch has values from -0.49"),
        ({"mask": mask[:, None]}, r"the mask of a batch is torch.int64 of shape \(2, 1, 32, 48\)"),
        ({"mask": mask.float()}, "the mask of a batch is torch.float32 of shape"),
        ({"mask": mask + 7}, "labels from 7 to 262, and there are 6 classes"),
        ({"mask": mask.where(mask > 0, -1)}, "labels from -1 to -1, and there are 6 classes"),
    ):
        batches = DataLoader([{"image": image, "mask": mask, **change}], batch_size=None)
        with pytest.raises(GenSegError, match=sentence):
            trainer(tmp_path).fit(make(), batches, batches)
        with pytest.raises(GenSegError, match=sentence):
            trainer(tmp_path).validate(make(), batches)


def test_batches_without_names_are_predicted(tmp_path):
    batch = {"image": torch.rand(1, 3, 32, 48)}
    (found,) = trainer(tmp_path).predict(make(), DataLoader([batch], batch_size=None))
    assert set(found) == {"mask"}


@pytest.mark.filterwarnings("ignore:Attribute 'teacher' is an instance of `nn.Module`")
def test_networks_and_functions_stay_out_of_checkpoints(tmp_path):
    """Nor do the arguments of a module around it get in."""

    class Taught(SoftmaxSegmenter):
        def __init__(self, teacher: Any = None, weigh: Any = None, share: float = 0.5, **kw: Any):
            super().__init__(**kw)
            self.teacher = teacher

    class Around(LightningModule):
        def __init__(self, lr: float = 0.1) -> None:
            super().__init__()
            self.inner = Taught(torch.nn.Linear(2, 2), torch.sigmoid, 0.2, **TINY)

    inner = Around().inner
    assert inner.hparams["share"] == 0.2
    assert not {"teacher", "weigh", "lr"} & set(inner.hparams)
    path = save(inner, tmp_path / "a.ckpt")
    loaded = Taught.load_from_checkpoint(path, teacher=torch.nn.Linear(2, 2))
    assert torch.equal(loaded.teacher.weight, inner.teacher.weight)


def test_a_network_of_ones_own_is_asked_for(tmp_path):
    path = save(SoftmaxSegmenter(6, features=PlainFeatures()), tmp_path / "a.ckpt")
    with pytest.raises(GenSegError, match=r"PlainFeatures, which is not imported: build it and"):
        SoftmaxSegmenter.load_from_checkpoint(path)
    SoftmaxSegmenter.load_from_checkpoint(path, features=PlainFeatures())


def test_the_module_normalises(tmp_path):
    model = make(mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])
    image = torch.rand(2, 3, 8, 8)
    expected = torch.stack([(image[:, i] - 0.1 * (i + 1)) / (0.5 + 0.1 * i) for i in range(3)], 1)
    torch.testing.assert_close(model.normalize(image), expected)
    path = save(model, tmp_path / "x.ckpt")
    loaded = SoftmaxSegmenter.load_from_checkpoint(path, features=PlainFeatures())
    torch.testing.assert_close(loaded.normalize(image), expected)


@pytest.mark.parametrize("method", [SoftmaxSegmenter, GMMSeg])
def test_a_checkpoint_needs_no_other_file(tmp_path, method):
    network = in_groups(**TINY, memory_size=10) if method is GMMSeg else TINY
    source = method(**network)
    torch.save(source.features.encoder.state_dict(), tmp_path / "encoder.pt")
    model = method(**network, encoder_weights=tmp_path / "encoder.pt")
    path = save(model, tmp_path / "x.ckpt")
    (tmp_path / "encoder.pt").unlink()
    loaded = method.load_from_checkpoint(path).eval()
    image = batch_of()["image"]
    assert loaded(image).equal(model.eval()(image))


MLA = {"level_channels": 8, "decoder_channels": 32, "depth": 1, "auxiliary": "shared"}


@pytest.mark.parametrize("method", [SoftmaxSegmenter, GMMSeg])
@pytest.mark.parametrize(
    ("decoder", "options", "weight"), [("ocrnet", {}, 0.4), ("mla", MLA, 0.25)]
)
def test_the_coarse_scores_of_a_decoder_join_the_loss(method, decoder, options, weight):
    network = {key: TINY[key] for key in ("num_classes", "encoder")}
    model = method(**network, decoder=decoder, network_options=options)
    model.eval()  # without dropout
    losses = model.compute_loss(batch_of())
    parts = {"loss_ce", "loss_component"} if method is GMMSeg else set()
    assert parts | {"loss", "loss_auxiliary"} <= set(losses)
    model.features.auxiliary_weight = 0.0
    without = model.compute_loss(batch_of())["loss"]
    torch.testing.assert_close(losses["loss"], without + weight * losses["loss_auxiliary"])
    losses["loss_auxiliary"].backward()
    assert any(p.grad is not None for p in model.features.decoder.parameters())


# --- sentences -------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [{"encoder_weights": "x.pt"}, {"network_options": {"a": 1}}])
def test_options_of_a_network_by_name_beside_one_of_your_own(option):
    with pytest.raises(GenSegError, match=f"^{next(iter(option))} is of a network by name"):
        SoftmaxSegmenter(3, features=PlainFeatures(), **option)


def test_a_device_without_float64():
    check_device(torch.device("cuda"))
    with pytest.raises(GenSegError, match=r"^the device is mps, .* \(trainer\.accelerator cpu\)"):
        check_device(torch.device("mps"))


def test_a_nan_image_is_named(tmp_path):
    samples = [dict(sample) for sample in scenes()[:4]]
    samples[3]["image"] = torch.full_like(samples[3]["image"], torch.nan)
    data = torch.utils.data.DataLoader(samples, batch_size=2)
    names = f"{samples[2]['name']}, {samples[3]['name']}"
    with pytest.raises(GenSegError, match=rf"loss is nan at step 1 \(images {names}\); lower"):
        trainer(tmp_path).fit(make(), data, loader(2))


def test_an_explosion_is_noticed_with_or_without_names(tmp_path):
    model = make(optimizer=lambda groups: torch.optim.SGD(groups, lr=1e30))
    samples = [{"image": s["image"], "mask": s["mask"]} for s in scenes()[:8]]
    data = torch.utils.data.DataLoader(samples, batch_size=2)
    with pytest.raises(GenSegError, match=r"The loss is (nan|inf) at step [123] \(images without"):
        trainer(tmp_path).fit(model, data, loader(2))


def test_an_incomplete_method_cannot_be_built():
    class Half(SegmentationModule):
        def forward(self, image):
            return image

    with pytest.raises(TypeError, match="compute_loss"):
        Half(num_classes=2)


@pytest.mark.parametrize("method", [SoftmaxSegmenter, GMMSeg])
def test_a_class_is_not_ignored(method):
    for number in (0, 5, 255):
        with pytest.raises(GenSegError, match=f"ignore_index is {number}, which is one of the 300"):
            method(num_classes=300, ignore_index=number, features=PlainFeatures())
    options = {"em": EMOptions(memory_size=1)} if method is GMMSeg else {}  # of 12 GB else
    model = method(num_classes=300, ignore_index=-1, features=PlainFeatures(), **options)
    mask = torch.full((1, 32, 32), -1)
    mask[:, :16] = 255
    batch = {"image": torch.rand(1, 3, 32, 32), "mask": mask}
    assert model.compute_loss(batch)["loss"] > 0
    assert model.compute_loss({**batch, "mask": mask.clamp_max(-1)})["loss"] == 0


def test_a_head_ignores_no_class_either():
    with pytest.raises(GenSegError, match="ignore_index is 255, which is one of the 300 classes"):
        GMMHead(8, num_classes=300)


@pytest.mark.parametrize("names", [["a b", "a_b"], ["x/y", "x y"], ["same", "same"], ["", ""]])
def test_names_that_are_one_key_are_refused(names):
    with pytest.raises(GenSegError, match="are both logged as IoU_"):
        SoftmaxSegmenter(2, features=PlainFeatures(), class_names=names)


def test_predict_image_of_a_file_and_of_a_pil_image(tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(30, 41, 3), dtype=np.uint8)
    turned = Image.fromarray(np.rot90(pixels))  # as a camera stores it
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "a.png", exif=exif)
    model = SoftmaxSegmenter(**TINY)
    expected = model.predict_image(pixels)["scores"]
    for image in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.open(tmp_path / "a.png")):
        np.testing.assert_array_equal(model.predict_image(image)["scores"], expected)
    grey = Image.fromarray(pixels[..., 0])
    assert model.predict_image(grey)["mask"].shape == (30, 41)
    with pytest.raises(MissingFileError, match=r"image '.*b\.png' does not exist"):
        model.predict_image(tmp_path / "b.png")
