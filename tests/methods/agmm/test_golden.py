"""The authors' own losses, maps and gradients (tests/golden/make.py says what these are)."""

import pytest
import torch
from torch import nn

from lightning_genseg import AGMM
from tests.golden.compare import close, close_all

AUTHORS = {"probability": "image", "padding": "blurred", "empty_images": "counted"}
CASES = ["plain", "padded", "empty"]
TERMS = ("ce", "self", "gaussian", "contrast", "image_class", "total")


class Given(nn.Module):
    """A network that gives the features of the file, whatever the image."""

    out_channels = 16

    def __init__(self, features):
        super().__init__()
        self.features = features

    def forward(self, image):
        return self.features


@pytest.fixture(scope="module")
def golden(golden_of):
    return golden_of("agmm")


def authors_model(golden, case, **arguments):
    model = AGMM(
        5, **{"gaussians": AUTHORS, **arguments}, features=Given(golden[f"{case}/features"].clone())
    )
    model.classifier[0].p = 0.0
    model.features.features.requires_grad_()
    with torch.no_grad():
        model.classifier[1].weight.copy_(golden["input/classifier_weight"])
        model.classifier[1].bias.copy_(golden["input/classifier_bias"])
    return model


def batch_of(golden, case):
    labels = golden[f"{case}/labels"].long()  # 5 is unlabelled, 255 padding
    return {
        "image": torch.zeros(3, 3, *labels.shape[1:]),
        "mask": labels.masked_fill(labels == 5, 255),
        "unlabelled": labels == 5,
        "image_classes": golden[f"{case}/image_classes"].bool(),
    }


@pytest.mark.parametrize("case", CASES)
def test_the_inputs_are_understood(golden, case):
    model, batch = authors_model(golden, case), batch_of(golden, case)
    _, centres, present = model._gaussians(
        model.features.features, model.outputs(batch["image"])["logits"],
        batch["mask"], batch["unlabelled"],
    )  # fmt: skip
    mine = {
        "features": model.features.features,
        "labels": golden[f"{case}/labels"],
        "image_classes": golden[f"{case}/image_classes"],
        "logits": model.outputs(batch["image"])["logits"],
        "scores": model(batch["image"]),
        "centres": centres,
        "present": present,
    }
    own = {key: x for key, x in golden.items() if key.count("/") == 1}
    close_all(own, f"{case}/", mine, 1e-6)


@pytest.mark.parametrize(
    ("case", "setting"),
    [
        *((case, setting) for case in CASES for setting in ("fixed", "predicted", "uniform")),
        ("plain", "fixed_aligned_corners"),
    ],
)
def test_the_authors_losses(golden, case, setting, monkeypatch):
    variance, _, aligned = setting.partition("_")
    model = authors_model(golden, case, variance=variance, align_corners=bool(aligned))
    batch, mine = batch_of(golden, case), {}

    def spy(distance, present, variance=None):
        if variance is not None:
            mine["sigma"] = variance[..., 0, 0].sqrt()
        return gaussian_map(distance, present, variance)

    from lightning_genseg.methods.agmm.module import gaussian_map

    monkeypatch.setattr("lightning_genseg.methods.agmm.module.gaussian_map", spy)
    losses = model.compute_loss(batch)
    losses["loss_total"] = losses.pop("loss")
    mine |= losses | {"gaussian_map": model.gaussian_map(batch)}
    for term in TERMS:
        (gradient,) = torch.autograd.grad(
            losses[f"loss_{term}"], model.features.features, retain_graph=True
        )
        mine[f"grad_features_of_{term}"] = gradient
    wanted = dict(golden)
    if "sigma" in mine:  # without meaning for absent classes
        present = golden[f"{case}/present"]
        wanted[f"{case}/{setting}/sigma"] = golden[f"{case}/{setting}/sigma"] * present
        mine["sigma"] = mine["sigma"] * present
    gradients = {name: 2e-5 for name in mine if name.startswith("grad")}
    close_all(wanted, f"{case}/{setting}/", mine, 5e-6, gradients)


@pytest.mark.parametrize(
    ("case", "setting", "option", "name", "least"),
    [
        ("plain", "predicted", {"probability": "features"}, "gaussian_map", 0.005),
        ("padded", "fixed", {"padding": "exact"}, "gaussian_map", 0.05),
        ("empty", "fixed", {"empty_images": "left_out"}, "loss_self", 0.2),
    ],
)
def test_what_our_other_choices_change(golden, case, setting, option, name, least):
    """Otherwise the options would do nothing."""
    model = authors_model(golden, case, variance=setting, gaussians={**AUTHORS, **option})
    batch = batch_of(golden, case)
    mine = {"gaussian_map": model.gaussian_map(batch), **model.compute_loss(batch)}
    close(mine[name], golden[f"{case}/{setting}/{name}"], 1.0)
    with pytest.raises(AssertionError, match="is more than"):
        close(mine[name], golden[f"{case}/{setting}/{name}"], least)
