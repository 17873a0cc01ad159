import json
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_genseg import GSS, EMOptions, GMMSeg, MixtureOptions, SoftmaxSegmenter
from lightning_genseg.callbacks import CompareScores
from lightning_genseg.cli.calibrate import GenSegTrainer, calibrate, save_calibrated
from lightning_genseg.data import EpisodesDataModule, SyntheticScenesDataModule
from lightning_genseg.errors import GenSegError
from lightning_genseg.uncertainty.scores import DENSITY_SCORES, AnomalyName
from tests.methods.gss.parts import DECODER

TINY = {"num_classes": 3, "encoder": "tu-test_resnet", "decoder": "fpn"}


MIXTURE, EM = MixtureOptions(components=2, embedding_dim=8), EMOptions(memory_size=50)


def batches(count, size=(40, 52)):
    for _ in range(count):
        mask = torch.randint(3, (1, *size))
        mask[:, :4] = 255
        yield {"image": torch.rand(1, 3, *size), "mask": mask, "name": ["x"]}


def gmmseg(**arguments):
    return GMMSeg(**TINY, mixture=MIXTURE, em=EM, **arguments)


def unread():
    """Batches that nobody may read."""
    raise AssertionError("read")
    yield


@pytest.mark.parametrize(
    "inference",
    [
        None,
        {"scales": [0.5]},
        {"window": (32, 32), "stride": (16, 32)},
        {"scales": [0.75, 1.0], "flip": True},
    ],
)
def test_fits_every_score_under_any_inference(inference):
    model = gmmseg(inference=inference)
    thresholds = calibrate(model, batches(2), batches(9), progress=False)
    assert set(thresholds) == set(get_args(AnomalyName))
    assert model.training  # as it was
    image = torch.rand(1, 3, 40, 52)
    for name, threshold in thresholds.items():
        model.set_anomaly_score(name)
        prediction = model.eval().predict_step({"image": image, "name": ["x"]}, 0)
        above = prediction["anomaly"] > threshold.value
        assert torch.equal(prediction["anomaly_mask"], above)


def test_known_pixels_of_the_held_out_images_keep_the_promise():
    model = SoftmaxSegmenter(**TINY, anomaly_score="energy")
    held_out = list(batches(19))
    calibrate(model, batches(2), held_out, 0.1, "image", 0.05, progress=False)
    model.eval()
    shares = []
    for batch in held_out:
        flagged = model.predict_step(batch, 0)["anomaly_mask"]
        shares.append(flagged[batch["mask"] < 3].float().mean())
    assert max(shares) <= 0.1  # ceil(20 x 0.95) = 19: here all of them
    calibrate(model, batches(2), held_out, 0.1, "pixel", progress=False)
    flagged = [model.eval().predict_step(b, 0)["anomaly_mask"][b["mask"] < 3] for b in held_out]
    assert 0.08 < torch.cat(flagged).float().mean() <= 0.1


def test_softmax_has_no_density():
    thresholds = calibrate(SoftmaxSegmenter(**TINY), batches(1), batches(9), progress=False)
    assert set(thresholds) == set(get_args(AnomalyName)) - set(DENSITY_SCORES)


def test_the_checkpoint_carries_what_was_fitted(tmp_path: Path):
    model = gmmseg()
    trainer = Trainer(logger=False, barebones=True)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    calibrate(model, batches(1), batches(9), progress=False)
    save_calibrated(model, tmp_path / "a.ckpt", tmp_path / "b.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt", "b.ckpt"]
    loaded = GMMSeg.load_from_checkpoint(tmp_path / "b.ckpt", anomaly_score="mahalanobis")
    assert loaded.anomaly.thresholds == model.anomaly.thresholds
    image = torch.rand(1, 3, 40, 52)
    names = ["sml", "mahalanobis", "density"]
    mine, theirs = (m.eval().score_maps(image, names) for m in (model, loaded))
    for name in names:
        torch.testing.assert_close(theirs[name], mine[name])
    assert not GMMSeg.load_from_checkpoint(tmp_path / "a.ckpt").anomaly.thresholds


def test_a_promise_made_under_other_inference_options_is_refused():
    model = gmmseg(inference={"scales": [0.5], "flip": False})
    calibrate(model, batches(1), batches(9), progress=False)
    model.inference = {"scales": [0.5]}
    model.on_predict_start()
    model.inference = {"scales": [0.5], "flip": True}
    picture = partial(model.predict_image, np.zeros((16, 16, 3), np.uint8))
    for hook in (model.on_predict_start, model.on_test_start, picture):
        with pytest.raises(ValueError, match=r"calibrated with the options .* calibrate again"):
            hook()


def test_a_promise_made_when_tokens_were_read_otherwise_is_refused():
    model = GSS(3, encoder="tu-test_resnet", decoder=DECODER, anomaly_score="entropy")
    assert "energy" not in calibrate(model, batches(1), batches(9), progress=False)
    model.on_predict_start()
    model.decoding = "marginal"
    with pytest.raises(GenSegError, match=r"is used with {'decoding': 'marginal'}: calibrate"):
        model.on_predict_start()


def test_labels_may_be_larger_than_the_images(tmp_path):
    small = [{**b, "image": b["image"][..., ::2, ::2]} for b in batches(9)]
    model = gmmseg()
    calibrate(model, small, small, progress=False)
    for batch in small:
        batch["anomaly"] = torch.zeros_like(batch["mask"])
    run = Trainer(
        accelerator="cpu",
        logger=CSVLogger(tmp_path),
        callbacks=[CompareScores()],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.warns(UserWarning, match="no anomalous pixel has been seen"):
        run.test(model, DataLoader(small, batch_size=None), verbose=False)
    scores = json.loads((Path(run.log_dir) / "anomaly_scores.json").read_text())
    assert scores["density"]["AUROC"] is None  # JSON has no NaN, and nothing was anomalous


def test_training_on_forgets_what_was_fitted():
    model = gmmseg()
    calibrate(model, batches(1), batches(9), progress=False)
    model.on_train_start()
    assert model.anomaly.fitted_state() == {}


def test_an_interrupted_call_leaves_nothing_behind():
    model, clean = gmmseg(), list(batches(2))

    def interrupted():
        yield {**clean[0], "image": clean[0]["image"] / 10}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, interrupted(), batches(9), progress=False)
    calibrate(model, clean, batches(9), progress=False)
    state = model.anomaly.fitted_state()["statistics"]
    state = {name: value.clone() for name, value in state.items()}
    calibrate(model, clean, batches(9), progress=False)
    for name, value in model.anomaly.fitted_state()["statistics"].items():
        torch.testing.assert_close(value, state[name])


def test_predict_image_flags_as_well():
    model = gmmseg()
    calibrate(model, batches(1), batches(9), progress=False)
    prediction = model.predict_image(torch.randint(256, (40, 52, 3), dtype=torch.uint8).numpy())
    above = prediction["anomaly"] > model.anomaly.thresholds["density"].value
    assert (prediction["anomaly_mask"] == above).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": "images"}, "level is 'images'; it must be one of pixel, image"),
        ({"false_positive_rate": 1.5}, "false_positive_rate is 1.5"),
        ({"false_positive_rate": float("nan")}, "false_positive_rate is nan"),
        ({"risk": 0.0}, "risk is 0.0"),
        ({"held_out": DataLoader(range(5), batch_size=None)}, "5 held-out images are too few"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_read(arguments, message):
    data = {"train": unread(), "held_out": unread()}
    with pytest.raises(GenSegError, match=message):
        calibrate(SoftmaxSegmenter(**TINY), **{**data, **arguments}, progress=False)


def test_scores_that_a_model_cannot_have_are_refused():
    with pytest.raises(GenSegError, match="density, but SoftmaxSegmenter has no class densities"):
        SoftmaxSegmenter(**TINY, anomaly_score="density")
    with pytest.raises(GenSegError, match="sml, which is fitted after training"):
        SoftmaxSegmenter(**TINY, anomaly_score="sml").setup("fit")
    with pytest.raises(GenSegError, match="anomaly_score is 'nonsense'; it must be one of msp"):
        SoftmaxSegmenter(**TINY, anomaly_score="nonsense")
    with pytest.raises(GenSegError, match="anomaly_score is 'nonsense'; it must be one of msp"):
        SoftmaxSegmenter(**TINY).set_anomaly_score("nonsense")


BROKEN = [{**batch, "image": batch["image"] * torch.nan} for batch in batches(9)]
VOID = [{**batch, "mask": torch.full((1, 40, 52), 255)} for batch in batches(2)]


@pytest.mark.parametrize(
    ("train", "held_out", "message"),
    [
        (1, BROKEN, "anomaly scores are NaN"),
        (1, 5, "5 held-out images are too few"),
        (VOID, 9, "no labelled training pixel"),
        (1, VOID, "no labelled pixel in the held-out"),
    ],
)
def test_wrong_data_are_refused(train, held_out, message):
    train, held_out = (batches(x) if isinstance(x, int) else x for x in (train, held_out))
    with pytest.raises(GenSegError, match=message):
        calibrate(SoftmaxSegmenter(**TINY), train, held_out, progress=False)


def test_a_model_without_a_checkpoint_is_told(tmp_path):
    with pytest.raises(GenSegError, match="give that of the model with --ckpt_path"):
        GenSegTrainer(logger=False).calibrate(gmmseg(), SyntheticScenesDataModule())


def test_thresholds_are_of_the_precision_of_the_trainer():
    model, held_out = gmmseg(), list(batches(9))
    found = {}
    for precision in (None, "32-true", "bf16-mixed"):
        model.trainer = precision and Trainer(
            barebones=True, accelerator="cpu", precision=precision
        )
        found[precision] = calibrate(model, held_out, held_out, progress=False)["density"].value
    assert found[None] == found["32-true"] != found["bf16-mixed"]


@pytest.fixture
def saved(tmp_path):
    """A model, its data, and its checkpoint."""
    data = SyntheticScenesDataModule(
        size=(48, 64), train_length=20, val_length=20, eval_batch_size=1, num_workers=0
    )
    trainer = GenSegTrainer(logger=False, barebones=True)
    model = SoftmaxSegmenter(**{**TINY, "num_classes": data.num_classes})
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    return model, data, tmp_path / "a.ckpt"


def limited(**options):
    options |= {"limit_train_batches": 0.1, "limit_val_batches": 11, "enable_checkpointing": False}
    return GenSegTrainer(accelerator="cpu", logger=False, **options)


def test_the_command_calibrates_in_its_precision(saved):
    model, data, path = saved
    found = []
    for precision in ("32-true", "bf16-mixed"):
        limited(precision=precision).calibrate(model, data, path)
        found.append(model.anomaly.thresholds["energy"].value)
    assert found[0] != found[1]


def test_what_a_test_would_refuse_is_not_calibrated(saved):
    model, data, path = saved
    with pytest.raises(GenSegError, match="precision is bf16-true, but mixtures"):
        limited(precision="bf16-true").calibrate(model, data, path)
    episodes = EpisodesDataModule(data, novel_classes=["tree"], num_workers=0)
    with pytest.raises(GenSegError, match="makes no use of the supports of EpisodesDataModule"):
        limited().calibrate(model, episodes, path)


def test_scores_are_compared_in_the_precision_of_the_test(tmp_path):
    labelled = [{**b, "anomaly": (b["mask"] == 0).long()} for b in batches(3)]
    model = gmmseg()
    run = Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        logger=CSVLogger(tmp_path),
        callbacks=[CompareScores()],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    (report,) = run.test(model, DataLoader(labelled, batch_size=None), verbose=False)
    scores = json.loads((Path(run.log_dir) / "anomaly_scores.json").read_text())
    assert scores["density"]["AUROC"] == pytest.approx(report["test_AUROC"], abs=1e-7)


def test_the_command_keeps_the_limits_and_the_name(saved, tmp_path: Path):
    model, data, path = saved
    run = limited()
    run.calibrate(model, data, path)
    run.calibrate(model, data, tmp_path / "a-calibrated.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-calibrated.ckpt", "a.ckpt"]
    assert {threshold.samples for threshold in model.anomaly.thresholds.values()} == {11}
