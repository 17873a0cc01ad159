"""One more class from a few images: `GMMSeg.add_class` and `genseg add-class`."""

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lightning_genseg import GMMHead, GMMSeg
from lightning_genseg.errors import GenSegError
from lightning_genseg.methods.gmmseg.options import EMOptions, MixtureOptions
from lightning_genseg.mixtures import GaussianMixture, fit
from lightning_genseg.uncertainty import Threshold
from tests.contract import NUM_CLASSES, TINY, PlainFeatures, in_groups, save

OPTIONS = {"embedding_dim": None, "components": 2, "memory_size": 50, "variance_floor": 1e-3}
SEEN = {"logit_norm": "none", "train": "posthoc", "mean_momentum": 0.0}


def model(**own: Any) -> GMMSeg:
    """A mixture of the colours themselves, of images in which red and green were seen."""
    made = GMMSeg(**in_groups(num_classes=2, features=PlainFeatures(), **OPTIONS, **SEEN, **own))
    image, mask = picture([0, 1])
    features = made.outputs(image[None])["features"]
    for _ in range(5):
        made.update_mixture(features, mask[None])
    return made.eval()


def picture(classes: list[int]) -> tuple[Tensor, Tensor]:
    """Stripes in noisy colours, one for each class: red, green, blue."""
    stripes = torch.tensor(classes).repeat_interleave(16)
    mask = stripes.expand(24, -1)
    colors = torch.eye(3) * 0.8 + 0.1
    return (colors[mask] + 0.02 * torch.randn(*mask.shape, 3)).permute(2, 0, 1).clamp(0, 1), mask


class TestHead:
    def test_the_new_class_is_not_ignored(self):
        head = GMMHead(6, 3, MixtureOptions(2, None), EMOptions(memory_size=10), ignore_index=3)
        with pytest.raises(GenSegError, match="ignore_index is 3, which is one of the 4 classes"):
            head.add_class(torch.randn(20, 6))

    @pytest.mark.parametrize("covariance", ["diagonal", "full"])
    @pytest.mark.parametrize("logit_norm", ["none", "layernorm"])
    @pytest.mark.parametrize("memory", ["ring", "decay"])
    def test_the_old_classes_stay_as_they_are(self, covariance, logit_norm, memory):
        head = GMMHead(
            6,
            3,
            mixture=MixtureOptions(2, None, covariance=covariance),
            em=EMOptions(memory_size=10, memory=memory),
            logit_norm=logit_norm,
        ).eval()
        features = torch.randn(1, 6, 8, 8)
        embedding = head.embed(features)
        before = head.class_maps(embedding)[1]
        head.add_class(embedding[0].flatten(1).T)
        logits, after = head.class_maps(embedding)
        torch.testing.assert_close(after[:, :3], before)
        assert logits.shape == after.shape == (1, 4, 8, 8)
        assert after[:, 3].mean() > before.mean((0, 2, 3)).max()  # fitted to just these
        head.update_mixture(embedding, torch.full((1, 8, 8), 3))  # and EM goes on
        assert not torch.equal(head.class_maps(embedding)[1][:, 3], after[:, 3])

    def test_the_fit_is_that_of_scikit_learn(self):
        mixture = pytest.importorskip("sklearn.mixture")
        head = GMMHead(
            3,
            2,
            mixture=MixtureOptions(1, None, normalize_features=False, variance_floor=0.01),
            em=EMOptions(memory_size=10),
        )
        x = torch.randn(200, 3) * torch.tensor([1.0, 2.0, 0.5]) + 3
        head.add_class(x, shrinkage=0.0)
        theirs = mixture.GaussianMixture(1, covariance_type="diag", reg_covar=0.01).fit(x.numpy())
        np.testing.assert_allclose(
            head.mixture.log_density(x)[:, 2], theirs.score_samples(x.numpy()), rtol=1e-4, atol=1e-4
        )

    @pytest.mark.parametrize("frozen", [True, False])
    def test_trained_variances_have_the_floor_once(self, frozen):
        own = GaussianMixture(2, 1, 3, trainable=True, variance_floor=0.1)
        own.log_variances.requires_grad_(not frozen)
        x = torch.randn(200, 3) * torch.tensor([0.0, 0.5, 2.0])  # the first is all floor
        new = fit(x, components=1, variance_floor=0.1)
        own.append(new)
        torch.testing.assert_close(own.variances[2:].double(), new.variances, rtol=1e-5, atol=0)
        assert own.log_variances.isfinite().all()
        assert own.log_variances.requires_grad != frozen

    @pytest.mark.parametrize("covariance", ["diagonal", "full"])
    def test_covariances_of_few_samples_are_mixed_with_the_mean_of_the_others(self, covariance):
        own, others = (
            fit(torch.randn(300, 4) * scale, components=2, covariance=covariance)
            for scale in (0.2, torch.tensor([1.0, 2.0, 0.5, 1.0]))
        )
        before, pooled = own.variances.clone(), others.variances.mean((0, 1))
        own.shrink(others, 0.25)
        torch.testing.assert_close(own.variances, 0.75 * before + 0.25 * pooled)

    @pytest.mark.parametrize("unit", [True, False])
    def test_classes_that_were_never_fitted_have_no_say(self, unit):
        towards = GaussianMixture(3, 2, 4, unit_means=unit, variance_floor=0.01)
        assert not towards.fitted.any()
        own = fit(torch.randn(50, 4), components=2, unit_means=unit)
        before = own.variances.clone()
        own.shrink(towards, 0.5)
        torch.testing.assert_close(own.variances, before)
        towards.log_variances[0].fill_(math.log(0.5))
        assert towards.fitted.sum() == 2
        own.shrink(towards, 0.5)
        torch.testing.assert_close(own.variances, before / 2 + 0.25)

    def test_shrinkage_tells_a_class_of_few_samples_from_the_others(self):
        def accuracy(shrinkage: float) -> float:
            plain = MixtureOptions(1, None, normalize_features=False)
            head = GMMHead(32, 1, mixture=plain, em=EMOptions(memory_size=10), logit_norm="none")
            head.mixture.means.zero_()
            head.mixture.log_variances.fill_(2 * math.log(2))
            torch.manual_seed(0)
            head.add_class(2 * torch.randn(6, 32) + 1, shrinkage=shrinkage)
            x = 2 * torch.randn(2, 2000, 32) + torch.tensor([0.0, 1.0])[:, None, None]
            found = head.mixture.log_density(x.flatten(0, 1)).argmax(1).view(2, -1)
            return float((found == torch.tensor([[0], [1]])).float().mean())

        assert accuracy(0.0) < 0.65
        assert accuracy(0.5) > 0.75

    @pytest.mark.parametrize("shrinkage", [-0.1, 1.1])
    def test_wrong_shrinkage(self, shrinkage):
        head = GMMHead(3, 2, mixture=MixtureOptions(1, None))
        with pytest.raises(GenSegError, match="shrinkage"):
            head.add_class(torch.randn(9, 3), shrinkage=shrinkage)


class TestModule:
    def test_a_class_never_seen_is_told_from_the_others(self):
        made = model()
        image, mask = picture([2, 2])
        made.add_class([image], [(mask == 2).long()], "blue")
        assert made.num_classes == 3
        assert made.class_names == ["0", "1", "blue"]
        query, labels = picture([0, 1, 2])
        assert (made(query[None]).argmax(1)[0] == labels).float().mean() > 0.95
        made.val_metrics.update(made(query[None]).argmax(1), labels[None])
        assert len(made.val_metrics.compute()["IoU"]) == 3

    def test_the_class_is_as_frequent_as_the_median_one(self):
        made = model(class_prior="frequency")
        counts = made.head.class_counts.clone()
        image, mask = picture([2, 2])
        made.add_class([image], [(mask == 2).long()], "blue")
        assert made.head.class_counts.tolist() == [*counts.tolist(), int(counts.median())]
        query, labels = picture([0, 1, 2])
        assert (made(query[None]).argmax(1)[0] == labels).float().mean() > 0.95

    def test_thresholds_of_the_model_without_the_class_are_dropped(self):
        made = model()
        made.anomaly.thresholds["density"] = Threshold(0.0, 0.05, "pixel", 0.05, 100)
        image, mask = picture([2, 2])
        made.add_class([image], [(mask == 2).long()], "blue")
        assert not made.anomaly.thresholds

    def test_bytes_are_the_same_as_numbers(self):
        image, mask = picture([2, 2])
        image = (255 * image).round()
        seen, means = model(), []
        for given in (image.byte(), image / 255):
            made = copy.deepcopy(seen)
            made.add_class([given], [(mask == 2).long()], "blue")
            means.append(made.head.mixture.means[-1])
        torch.testing.assert_close(*means)

    def test_only_what_is_marked_counts(self):
        made = model()
        image, mask = picture([0, 2, 1])
        made.add_class([image], [(mask == 2).long()], "blue")
        query, labels = picture([0, 1, 2])
        assert (made(query[None]).argmax(1)[0] == labels).float().mean() > 0.95

    @pytest.mark.parametrize(
        ("decoder", "options"),
        [("ocrnet", {}), ("mla", {"decoder_channels": 32, "auxiliary": "shared"})],
    )
    def test_a_network_that_predicts_classes_itself_learns_no_other(self, decoder, options):
        made = GMMSeg(2, encoder="tu-test_resnet", decoder=decoder, network_options=options)
        with pytest.raises(GenSegError, match=f"{decoder} on tu-test_resnet predicts classes"):
            made.add_class([torch.rand(3, 64, 64)], [torch.ones(64, 64).long()], "blue")

    def test_images_are_seen_at_the_size_of_predictions(self):
        made, seen = model(), []
        made.inference = {"short_side": 48}
        made.features.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
        image, mask = picture([0, 2, 1])
        made.add_class([image], [(mask == 2).long()], "blue")
        assert seen == [(1, 3, 48, 96)]
        query, labels = picture([0, 1, 2])
        scores = made.predict_maps(query[None])["scores"]
        assert (scores.argmax(1)[0] == labels).float().mean() > 0.95

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (([], [], "blue"), "0 images and 0 masks"),
            (([torch.rand(3, 8, 8)], [], "blue"), "1 images and 0 masks"),
            (([torch.rand(3, 8, 8)], [torch.zeros(8, 8)], "blue"), "no mask marks 'blue' with 1"),
            (([torch.rand(3, 8, 8)], [torch.ones(8, 8)], "1"), "name is '1'"),
            (([torch.rand(3, 8, 8)], [torch.ones(8, 8)], " "), "name is empty"),
            (([255 * torch.rand(3, 8, 8)], [torch.ones(8, 8)], "blue"), "an image has values from"),
            (([torch.full((3, 8, 8), torch.nan)], [torch.ones(8, 8)], "blue"), "values from nan"),
            (([torch.rand(8, 8, 3)], [torch.ones(8, 8)], "blue"), r"3 x H x W"),
            (([torch.rand(3, 8, 8)], [torch.ones(9, 8)], "blue"), r"H x W"),
        ],
    )
    def test_wrong_arguments(self, arguments, sentence):
        made = model()
        with pytest.raises(GenSegError, match=sentence):
            made.add_class(*arguments)
        assert made.num_classes == 2

    def test_a_name_that_is_logged_as_another(self):
        made = model(class_names=["traffic light", "car"])
        with pytest.raises(GenSegError, match="are both logged as IoU_traffic_light"):
            made.add_class([torch.rand(3, 8, 8)], [torch.ones(8, 8)], "traffic_light")


class TestCommand:
    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Path:
        made = GMMSeg(**in_groups(**TINY, **{**OPTIONS, "embedding_dim": 8}))
        return save(made, tmp_path / "old.ckpt")

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        image, mask = picture([0, 2])
        for name, values in (
            ("images", (image.permute(1, 2, 0) * 255).byte()),
            ("masks", torch.where(mask == 2, 255, 0).byte()),
        ):
            (tmp_path / "few" / name).mkdir(parents=True)
            Image.fromarray(values.numpy()).save(tmp_path / "few" / name / "one.png")
        return tmp_path / "few"

    def test_the_checkpoint_knows_the_class(self, checkpoint, folder, genseg, capsys):
        genseg(
            f"add-class --ckpt_path {checkpoint} --root {folder} --name blue --output new.ckpt "
            "--value 255"
        )
        told = capsys.readouterr().err
        assert f"class {NUM_CLASSES} is 'blue'" in told
        option = re.search(r"(--data\.class_names .*) \(and", told)
        assert option is not None
        genseg(
            "predict --ckpt_path new.ckpt --model GMMSeg --data FolderDataModule "
            f"--data.root {folder} {option[1]} --data.predict_root {folder / 'images'} "
            "--predictions.output_dir found"
        )
        table = json.loads(checkpoint.with_name("found").joinpath("classes.json").read_text())
        assert "blue" in str(table)
        made = GMMSeg.load_from_checkpoint(checkpoint.with_name("new.ckpt"))
        assert made.num_classes == NUM_CLASSES + 1
        assert made.class_names[-1] == "blue"
        prediction = made.predict_image(np.asarray(Image.open(folder / "images" / "one.png")))
        assert prediction["scores"].shape[0] == NUM_CLASSES + 1
        old = GMMSeg.load_from_checkpoint(checkpoint)
        assert torch.equal(old.head.mixture.means, made.head.mixture.means[:-1])

    @pytest.mark.parametrize(
        ("changed", "sentence"),
        [
            ({"ckpt_path": "none.ckpt"}, "'none.ckpt' does not exist"),
            ({"root": "nowhere"}, "nowhere"),
            ({"value": "7"}, "few/masks' holds the value 7: set value"),
            ({"output": "old.ckpt"}, "'old.ckpt' exists"),
        ],
    )
    def test_wrong_arguments(self, checkpoint, folder, genseg, capsys, changed, sentence):
        options = {"ckpt_path": checkpoint, "root": folder, "name": "blue", "value": "255"}
        words = " ".join(
            f"--{key} {value}"
            for key, value in {**options, "output": "new.ckpt", **changed}.items()
        )
        with pytest.raises(SystemExit):
            genseg(f"add-class {words}")
        assert sentence in capsys.readouterr().err
        assert not checkpoint.with_name("new.ckpt").exists()
