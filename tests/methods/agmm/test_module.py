"""AGMM: its losses against the formulas by loops, where gradients go, hostile batches."""

import re
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from lightning_genseg import AGMM, SoftmaxSegmenter
from lightning_genseg.data import Points, SparseDataset, SyntheticScenes
from lightning_genseg.data.loaders import collate
from lightning_genseg.errors import GenSegError
from lightning_genseg.methods.agmm.gaussian_map import centre_similarity, class_centres
from lightning_genseg.networks.losses import pixel_cross_entropy
from tests.contract import NUM_CLASSES, TINY, ModuleContract, mean_iou, save, scenes

OFF = dict.fromkeys(
    ("self_weight", "gaussian_weight", "contrast_weight", "image_class_weight"), 0.0
)


def make(**arguments: Any) -> AGMM:
    return AGMM(**{**TINY, **arguments})


class TestAGMM(ModuleContract):
    def make(self, **arguments: Any) -> AGMM:
        return make(**arguments)


@cache
def points(count: int = 3) -> list[dict[str, Any]]:
    """The scenes of the contract, with so many labelled pixels for each class in an image."""
    dataset = SparseDataset(SyntheticScenes(32, (48, 64), seed=0), Points(count))
    return [dataset[i] for i in range(32)]


def sparse_batch() -> dict[str, Any]:
    """Four images in which nobody has labelled class 5."""
    batch = collate(points()[:4])
    forgotten = batch["mask"] == 5
    assert forgotten.any()
    batch["mask"][forgotten], batch["unlabelled"][forgotten] = 255, True
    batch["image_classes"][:, 5] = False
    return batch


def padded(batch: dict[str, Any], columns: int = 24) -> dict[str, Any]:
    """The batch with its last columns outside of the image."""
    batch = {key: x.clone() if isinstance(x, Tensor) else x for key, x in batch.items()}
    batch["image"][..., -columns:] = 0
    batch["mask"][..., -columns:] = 255
    batch["unlabelled"][..., -columns:] = False
    return batch


# --- the losses, written down once more, pixel by pixel ----------------------------------------


class Given(nn.Module):
    """A network whose features are given."""

    out_channels = 5

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.given = nn.Parameter(features)

    def forward(self, image: Tensor) -> Tensor:
        return self.given


def reference(
    features: Tensor, logits: Tensor, batch: dict[str, Any], variance: str, centre: str
) -> dict[str, float]:
    """The losses of section 2 by loops in float64; empty ones by our rules."""
    mask, unlabelled = batch["mask"].numpy(), batch["unlabelled"].numpy()
    tags, size = batch["image_classes"].numpy(), batch["mask"].shape[-2:]
    large = F.interpolate(features.double(), size, mode="bilinear").detach().numpy()
    probability = F.interpolate(logits.double(), size, mode="bilinear").softmax(1).detach().numpy()
    small = features.double().detach().numpy()
    coarse = logits.double().softmax(1).detach().numpy()
    classes, eps = probability.shape[1], 1e-6
    own, self_terms, gaussian_terms, tag_terms = [], [], [], []

    def half_cross_entropy(p: dict[int, float], target: dict[int, float]) -> float:
        terms = [
            q * np.log(p[c] + eps) + (1 - q) * np.log(1 - p[c] + eps) for c, q in target.items()
        ]
        return -np.mean(terms) / 2

    for b in range(len(mask)):
        centres = {
            c: large[b][:, mask[b] == c].mean(1) for c in range(classes) if (mask[b] == c).any()
        }
        own.append(centres)
        maps = {}
        for c, mu in centres.items():
            squared = np.abs(small[b] - mu[:, None, None]).mean(0) ** 2
            inside = ((mask[b] != 255) | unlabelled[b]).reshape(len(squared), 4, -1, 4).mean((1, 3))
            weight = inside * (coarse[b, c] if variance == "predicted" else 1)
            sigma = (weight * squared).sum() / weight.sum()
            g = np.exp(-squared if variance == "fixed" else -squared / (2 * sigma + eps))
            g = F.interpolate(torch.from_numpy(g)[None, None], size, mode="bilinear")
            maps[c] = g.numpy()[0, 0]
        for y, x in np.ndindex(*size):
            p = probability[b, :, y, x]
            if mask[b, y, x] == 255 and not unlabelled[b, y, x]:
                continue
            if tags[b].any():
                tag_terms.append(
                    sum(-np.log(1 - p[c] + eps) for c in range(classes) if not tags[b, c])
                )
            if not centres:
                continue
            g = {c: maps[c][y, x] for c in centres}
            self_terms.append(half_cross_entropy(p, g))
            if mask[b, y, x] != 255:
                label = {c: float(c == mask[b, y, x]) for c in g}
                gaussian_terms.append(half_cross_entropy(g, label))
    vectors = {}
    for c in range(classes):
        held = [centres[c] for centres in own if c in centres]
        if held:
            vectors[c] = np.sum(held, 0) if centre == "sum" else np.mean(held, 0)
    pairs = [
        np.exp(-(np.abs(vectors[i] - vectors[j]).mean() ** 2))
        for i in vectors for j in vectors if i < j
    ]  # fmt: skip
    return {
        "loss_self": np.mean(self_terms),
        "loss_gaussian": np.mean(gaussian_terms),
        "loss_contrast": np.mean(pairs),
        "loss_image_class": np.mean(tag_terms),
    }


@pytest.mark.parametrize(
    ("arguments", "variance", "centre"),
    [
        ({}, "fixed", "sum"),
        ({"preset": "paper"}, "predicted", "mean"),
        ({"preset": "paper", "variance": "uniform"}, "uniform", "mean"),
        ({"contrast_centre": "mean"}, "fixed", "mean"),
    ],
)
def test_losses_are_those_of_the_formulas(arguments, variance, centre):
    batch = padded(sparse_batch())
    for b in (1, 2):  # the second image has no label in the crop, the third none anywhere
        batch["unlabelled"][b] |= batch["mask"][b] != 255
        batch["mask"][b] = 255
    batch["image_classes"][1, :2] = False
    batch["image_classes"][2] = False
    model = make(
        network_options=None, features=Given(torch.rand(4, 5, 12, 16)), dropout=0.0, **arguments
    )
    losses = model.compute_loss(batch)
    logits = model.classifier(model.features.given)
    expected = reference(model.features.given, logits, batch, variance, centre)
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-4), name
        assert value > 0
    total = losses["loss_ce"].item() + sum(expected.values())
    assert losses["loss"].item() == pytest.approx(total, rel=1e-4)


def test_every_term_has_its_weight():
    batch = sparse_batch()
    model = make().eval()
    everything = model.compute_loss(batch)
    for name in OFF:
        only = make(**{**OFF, name: 3.0}).eval()
        only.load_state_dict(model.state_dict())
        losses = only.compute_loss(batch)
        term = "loss_" + name.removesuffix("_weight")
        assert set(losses) == {"loss", "loss_ce", term}
        torch.testing.assert_close(losses[term], everything[term])
        torch.testing.assert_close(losses["loss"], losses["loss_ce"] + 3 * losses[term])


def test_without_its_terms_it_is_the_partial_cross_entropy():
    batch = sparse_batch()
    model, baseline = make(**OFF).eval(), SoftmaxSegmenter(**TINY).eval()
    baseline.load_state_dict(model.state_dict())
    del batch["image_classes"]  # nothing asks for it
    assert torch.equal(model.compute_loss(batch)["loss"], baseline.compute_loss(batch)["loss"])
    expected = pixel_cross_entropy(baseline(batch["image"]), batch["mask"])
    assert torch.equal(model.compute_loss(batch)["loss"], expected)


# --- where gradients go ------------------------------------------------------------------------


def test_self_supervision_teaches_prediction_features_and_centres():
    mask = torch.full((1, 48, 64), 255)
    mask[0, 2, 2], mask[0, 40, 60] = 0, 1
    batch = {"image": torch.rand(1, 3, 48, 64), "mask": mask, "unlabelled": mask == 255}
    model = make(
        **{**OFF, "self_weight": 1.0},
        network_options=None,
        features=Given(torch.rand(1, 5, 12, 16)),
        dropout=0.0,
    )

    def gradients(**options: Any) -> tuple[Tensor, Tensor]:
        for name, value in options.items():
            setattr(model, name, value)
        model.zero_grad()
        (model.compute_loss(batch)["loss_self"]).backward()
        return model.features.given.grad.clone(), model.classifier[1].weight.grad.clone()

    through_both, classifier = gradients(detach_gaussian=False)
    through_prediction, same = gradients(detach_gaussian=True)
    assert (classifier != 0).any()
    torch.testing.assert_close(classifier, same)
    difference = through_both - through_prediction
    assert (difference != 0).any()
    # Nothing but the centre of class 0 moves when only its own pixel's neighbours may learn.
    gaussian, centres, _ = model._gaussians(
        model.features.given, model.classifier(model.features.given), mask, mask == 255
    )
    (through_centres,) = torch.autograd.grad(gaussian.sum(), centres)
    assert (through_centres[0, :2] != 0).any(1).all()
    assert (through_centres[0, 2:] == 0).all()


@pytest.mark.parametrize("variance", ["predicted", "uniform"])
def test_the_variance_is_no_way_for_a_gradient(variance):
    batch = sparse_batch()
    model = make(
        variance=variance,
        dropout=0.0,
        network_options=None,
        features=Given(torch.rand(4, 5, 12, 16)),
    )
    features = model.features.given
    logits = torch.randn(4, NUM_CLASSES, 12, 16, requires_grad=True)
    gaussian = model._gaussians(features, logits, batch["mask"], batch["unlabelled"])[0]
    (of_logits,) = torch.autograd.grad(gaussian.sum(), logits, allow_unused=True)
    assert of_logits is None


# --- what counts as unlabelled -----------------------------------------------------------------


@pytest.mark.parametrize("preset", ["code", "paper"])
def test_padding_is_not_unlabelled(preset):
    model, batch = make(preset=preset, dropout=0.0).eval(), padded(sparse_batch())
    wrong = {**batch, "unlabelled": batch["mask"] == 255}
    right, trapped = model.compute_loss(batch), model.compute_loss(wrong)
    assert right["loss_ce"] == trapped["loss_ce"]
    for term in ("loss_self", "loss_image_class"):
        assert right[term] != trapped[term]


@pytest.mark.parametrize("aligned", [False, True])
def test_centres_of_an_image_that_the_network_pads(aligned):
    """With aligned corners its features span the image, otherwise what is padded as well."""
    model, batch = make(align_corners=aligned).eval(), sparse_batch()
    for key in ("image", "mask", "unlabelled"):
        batch[key] = batch[key][..., :37, :50]
    features, mask = model.extract(batch["image"])[0], batch["mask"]
    whole = model.cover(mask, features)
    assert whole.shape != mask.shape
    centres, present = class_centres(features, mask if aligned else whole, NUM_CLASSES)
    expected = centre_similarity(centres.sum(0), present.any(0))
    torch.testing.assert_close(model.compute_loss(batch)["loss_contrast"], expected)


def test_a_batch_of_dense_labels_is_refused():
    batch, model = sparse_batch(), make()
    for key in ("unlabelled", "image_classes"):
        rest = {name: value for name, value in batch.items() if name != key}
        with pytest.raises(GenSegError, match=f"the batch has no {key}: set data.sparse"):
            model.compute_loss(rest)
    dense = {"image": batch["image"], "mask": batch["mask"]}
    with pytest.raises(GenSegError, match="no image_classes and no unlabelled"):
        model.compute_loss(dense)
    with pytest.raises(GenSegError, match="the batch has no unlabelled"):
        model.gaussian_map(dense)


@pytest.mark.parametrize(
    ("name", "change", "found", "needed"),
    [
        ("unlabelled", Tensor.long, "int64 of shape (4, 48, 64)", "(4, 48, 64)"),
        ("unlabelled", lambda x: x[:, :-1], "bool of shape (4, 47, 64)", "(4, 48, 64)"),
        ("image_classes", Tensor.float, "float32 of shape (4, 6)", "(4, 6)"),
        ("image_classes", lambda x: x[:, 1:], "bool of shape (4, 5)", "(4, 6)"),
    ],
)
def test_labels_of_another_kind_are_refused(name, change, found, needed):
    batch = sparse_batch()
    batch[name] = change(batch[name])
    sentence = f"{name} of the batch is torch.{found} but AGMM needs torch.bool of shape {needed}"
    with pytest.raises(GenSegError, match=re.escape(sentence)):
        make().compute_loss(batch)


# --- hostile batches ---------------------------------------------------------------------------


def unlabelled_only() -> dict[str, Any]:
    batch = sparse_batch()
    batch["mask"].fill_(255)
    batch["unlabelled"].fill_(True)
    batch["image_classes"].fill_(False)
    return batch


def all_padding() -> dict[str, Any]:
    batch = sparse_batch()
    batch["mask"].fill_(255)
    batch["unlabelled"].fill_(False)
    return batch


@pytest.mark.parametrize("batch", [unlabelled_only(), all_padding()])
@pytest.mark.parametrize("preset", ["code", "paper"])
def test_nothing_to_learn_costs_nothing(batch, preset):
    model = make(preset=preset)
    losses = model.compute_loss(batch)
    losses["loss"].backward()
    assert len(losses) == 6
    assert all(value == 0 for value in losses.values())
    assert all((p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("preset", ["code", "paper"])
def test_images_without_labels_do_not_change_what_another_teaches(preset):
    model, batch = make(preset=preset, dropout=0.0).eval(), sparse_batch()
    for key, value in (("mask", 255), ("unlabelled", True), ("image_classes", False)):
        batch[key][1:] = value
    alone = {key: x[:1] for key, x in batch.items()}
    losses, expected = model.compute_loss(batch), model.compute_loss(alone)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)
        assert value > 0


@pytest.mark.parametrize("preset", ["code", "paper"])
def test_one_pixel_of_one_class(preset):
    batch = unlabelled_only()
    batch["mask"][0, 47, 63], batch["unlabelled"][0, 47, 63] = 2, False
    batch["image_classes"][0, 2] = True
    model = make(preset=preset)
    losses = model.compute_loss(batch)
    losses["loss"].backward()
    assert all(value.isfinite() for value in losses.values())
    assert losses["loss_contrast"] == 0  # there is no second class
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("preset", ["code", "paper"])
def test_features_of_any_size_and_in_half_precision(preset):
    model, batch = make(preset=preset), sparse_batch()
    exact = model.eval().compute_loss(batch)["loss"].item()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.compute_loss(batch)
    assert all(value.dtype == torch.float32 for value in losses.values())
    assert losses["loss"].item() == pytest.approx(exact, rel=0.05)
    for scale in (1e-6, 1e6):
        given = make(
            preset=preset, network_options=None, features=Given(scale * torch.rand(4, 5, 12, 16))
        )
        given.compute_loss(batch)["loss"].backward()
        assert given.features.given.grad.isfinite().all()


# --- the Gaussian map --------------------------------------------------------------------------


def test_gaussian_map_to_look_at():
    model, batch = make(), sparse_batch()
    batch = {
        key: x[..., :37, :51] if key not in ("name", "image_classes") else x
        for key, x in batch.items()
    }
    gaussian = model.gaussian_map(batch)
    assert gaussian.shape == (4, NUM_CLASSES, 37, 51)
    assert not gaussian.requires_grad
    assert model.training
    assert ((gaussian >= 0) & (gaussian <= 1)).all()
    for b in range(4):
        labels = batch["mask"][b]
        for c in range(NUM_CLASSES):
            assert bool((labels == c).any()) == bool((gaussian[b, c] > 0).any())
    # A class likes its own pixels more than the others like them.
    labelled = batch["mask"] != 255
    own = gaussian.movedim(1, -1)[labelled].argmax(1) == batch["mask"][labelled]
    assert own.float().mean() > 0.8


# --- does it learn -----------------------------------------------------------------------------


def train(model: SoftmaxSegmenter, steps: int) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        optimizer.zero_grad()
        model.compute_loss(collate(points()[step * 4 % 32 : step * 4 % 32 + 4]))["loss"].backward()
        optimizer.step()
    return mean_iou(model)


def test_points_teach_the_whole_image():
    labelled = sum(int((sample["mask"] != 255).sum()) for sample in points())
    assert labelled < 0.01 * 32 * 48 * 64
    model = make()
    chance = mean_iou(model)
    score = train(model, 30)
    assert chance < 0.15
    assert score > 0.4


def test_a_checkpoint_is_that_of_a_softmax_segmenter(tmp_path):
    model = make()
    state = torch.load(save(model, tmp_path / "model.ckpt"), weights_only=True)["state_dict"]
    plain = SoftmaxSegmenter(**TINY)
    plain.load_state_dict(state)
    image = scenes()[0]["image"][None]
    assert torch.equal(plain.eval()(image), model.eval()(image))


# --- on a GPU, without one -----------------------------------------------------------------------

AUTHORS = {
    "align_corners": True,
    "gaussians": {"probability": "image", "padding": "blurred", "empty_images": "counted"},
}


class Empty(nn.Module):
    """A network without parameters, which would have to be fake."""

    out_channels = 5

    def forward(self, image: Tensor) -> Tensor:
        return torch.empty(2, 5, 12, 16)


@pytest.mark.parametrize(
    "arguments", [{}, {"variance": "uniform"}, {"preset": "paper", **AUTHORS}], ids=str
)
def test_no_shape_depends_on_a_label(arguments):
    """A GPU would have to be waited for. Fake tensors know their shapes and nothing else."""
    model = AGMM(5, features=Empty(), dropout=0.0, **arguments)
    with FakeTensorMode(), torch.device("cuda"):
        model.classifier = nn.Conv2d(5, 5, 1)
        model.mean, model.std = torch.empty(3, 1, 1), torch.empty(3, 1, 1)
        batch = {
            "image": torch.empty(2, 3, 48, 64),
            "mask": torch.empty(2, 48, 64, dtype=torch.int64),
            "unlabelled": torch.empty(2, 48, 64, dtype=torch.bool),
            "image_classes": torch.empty(2, 5, dtype=torch.bool),
        }
        losses = model.compute_loss(batch)
        assert {loss.device.type for loss in losses.values()} == {"cuda"}
