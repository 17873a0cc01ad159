import json

import pytest
import torch
from lightning.pytorch import seed_everything

from lightning_genseg import MaskigeTokenizer
from lightning_genseg.cli.reconstruct import reconstruct_data
from lightning_genseg.data import CrossDomainDataModule, FolderDataModule
from tests.contract import NUM_CLASSES, batch_of, loader, trainer
from tests.domains import FIELD, TABLE, write_domain

SMALL = {"num_classes": NUM_CLASSES, "levels": [5, 5, 4], "channels": 16, "blocks": 1}


def test_images_are_not_looked_at():
    model = MaskigeTokenizer(**SMALL).eval()
    batch = batch_of()
    plain = model.compute_loss({"mask": batch["mask"]})["loss"]
    assert torch.equal(model.compute_loss({**batch, "image": batch["image"] * 0})["loss"], plain)
    scores = model.maps_at_labels({"mask": batch["mask"]})["scores"]
    assert scores.shape == (2, NUM_CLASSES, 48, 64)


def test_predicting_photographs_is_refused(tmp_path):
    model = MaskigeTokenizer(**SMALL)
    sentence = "a MaskigeTokenizer knows masks only and predicts no images: give what"
    with pytest.raises(ValueError, match=sentence):
        trainer(tmp_path).predict(model, loader(2))
    with pytest.raises(ValueError, match=sentence):
        model(torch.rand(1, 3, 20, 20))


def test_fit_log_save_and_load(tmp_path):
    colors = tmp_path / "colors.json"
    table = [[30 * i, 255 - 40 * i, 20] for i in range(NUM_CLASSES)] + [[0, 0, 0]]
    colors.write_text(json.dumps(table))
    model = MaskigeTokenizer(**SMALL, colors=colors)
    run = trainer(tmp_path)
    run.fit(model, loader(), loader(2))
    logged = set(run.callback_metrics)
    assert {"train_loss", "train_loss_l1", "train_loss_cross_entropy", "val_mIoU"} <= logged
    path = tmp_path / "model.ckpt"
    run.save_checkpoint(path)
    colors.unlink()  # the checkpoint holds what it said
    assert torch.load(path, weights_only=True)["tokenizer"] == model.tokenizer.config()
    loaded = MaskigeTokenizer.load_from_checkpoint(path)
    assert loaded.tokenizer.fingerprint() == model.tokenizer.fingerprint()
    assert loaded.maskige.fingerprint() == model.maskige.fingerprint()
    result = trainer(tmp_path).test(loaded, loader(2), verbose=False)[0]
    assert 0 <= result["test_mIoU"] <= 1


def test_training_is_the_same_under_the_same_seed():
    runs = []
    for seed in (3, 3, 4):
        seed_everything(seed, verbose=False)
        model = MaskigeTokenizer(**SMALL)
        runs.append([model.compute_loss(batch_of())["loss"].item() for _ in range(2)])
    assert runs[0] == runs[1] != runs[2]


def test_ignored_pixels():
    model = MaskigeTokenizer(**SMALL)
    for training in (True, False):
        model.train(training)
        model.procedural_share = 0.0
        losses = model.compute_loss({"mask": torch.full((2, 30, 37), 255)})
        losses["loss"].backward()
        assert losses["loss"] == 0
        assert all(p.grad.isfinite().all() for p in model.parameters())
    mask = batch_of()["mask"].clone()
    half = model.compute_loss({"mask": mask[..., :32]})["loss"]
    mask[..., 32:] = 255
    # Their colour is seen across the border, and only there.
    torch.testing.assert_close(model.compute_loss({"mask": mask})["loss"], half, rtol=0.05, atol=0)


def test_objectives():
    batch = batch_of()
    for objective, names in (
        ("l1", {"loss_l1"}),
        ("cross_entropy", {"loss_cross_entropy"}),
        ("both", {"loss_l1", "loss_cross_entropy"}),
    ):
        model = MaskigeTokenizer(**SMALL, objective=objective).eval()
        losses = model.compute_loss(batch)
        assert set(losses) == {"loss", *names}
        torch.testing.assert_close(losses["loss"], sum(losses[name] for name in names))
        losses["loss"].backward()
        assert all(
            p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "spatial" not in n
        )
    target = model.maskige(batch["mask"])
    picture = model.tokenizer(target)
    labelled = (batch["mask"] != 255)[:, None].expand_as(target)
    expected = (picture - target)[labelled].abs().mean()
    torch.testing.assert_close(losses["loss_l1"], expected)


def test_masks_are_varied():
    mask = batch_of(0, 8)["mask"]
    plain = {"permute_classes": False, "corrupted_share": 0.0, "procedural_share": 0.0}
    assert torch.equal(MaskigeTokenizer(**SMALL, **plain).vary(mask), mask)
    for changed in ({"permute_classes": True}, {"corrupted_share": 1.0}, {"procedural_share": 1.0}):
        varied = MaskigeTokenizer(**SMALL, **{**plain, **changed}).vary(mask)
        assert varied.shape == mask.shape
        assert all((a != b).any() for a, b in zip(varied, mask, strict=True))


def test_wrong_arguments():
    for name, value, message in (
        ("corrupted_share", 1.5, "corrupted_share is 1.5 but must be a probability"),
        ("procedural_share", -0.1, "procedural_share is -0.1"),
        ("temperature", 0.0, "temperature is 0.0 but must be positive"),
        ("scale", 0.0, "scale is 0.0"),
        ("colors", "ade20k", "colors ade20k is for 150 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            MaskigeTokenizer(**SMALL, **{name: value})


def test_a_checkpoint_of_other_colours_is_refused(tmp_path):
    run = trainer(tmp_path)
    run.strategy.connect(MaskigeTokenizer(**SMALL))
    run.save_checkpoint(tmp_path / "lattice.ckpt")
    other = MaskigeTokenizer(**SMALL, colors="random")
    with pytest.raises(ValueError, match="trained with other colors: use the same"):
        trainer(tmp_path).test(other, loader(2), ckpt_path=tmp_path / "lattice.ckpt")


def test_masks_of_other_classes_are_refused(tmp_path):
    write_domain(tmp_path / "field", "field", 1)
    (tmp_path / "all.txt").write_text("0")
    (tmp_path / "table.tsv").write_text(TABLE)
    field = FolderDataModule(
        tmp_path / "field", class_names=FIELD, test_list=tmp_path / "all.txt", num_workers=0
    )
    data = CrossDomainDataModule(field, tmp_path / "table.tsv", "field", num_workers=0)
    model = MaskigeTokenizer(**{**SMALL, "num_classes": data.num_classes})
    with pytest.raises(
        ValueError, match=r"others \(heaven, ground, \.\.\.\): test it on MixedData"
    ):
        trainer(tmp_path).test(model, data)
    with pytest.raises(ValueError, match="reconstruct draws masks in the colours of the universal"):
        reconstruct_data(data, split="test", output_dir=tmp_path)
