"""The authors' own losses and their gradients (golden/README.md of the shared data).

Not compared: what that page lists as a known difference of ours, the variance by `predicted`
probabilities, G next to padding, and the self-supervision of an image without labels.
"""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_genseg import AGMM

TERMS = ("ce", "self", "gaussian", "contrast", "image_class", "total")
# Neither G nor the self-supervision takes part in these.
EVERYWHERE = ("ce", "contrast", "image_class")
COMPARED = {
    ("plain", "fixed"): TERMS,
    ("plain", "uniform"): TERMS,
    ("plain", "predicted"): EVERYWHERE,
    ("padded", "fixed"): EVERYWHERE,
    ("padded", "predicted"): EVERYWHERE,
    ("empty", "fixed"): EVERYWHERE,
}


class Given(nn.Module):
    """A network that gives the features of the file, whatever the image."""

    out_channels = 16

    def __init__(self, features):
        super().__init__()
        self.features = features

    def forward(self, image):
        return self.features


@pytest.fixture(scope="module")
def golden(shared_dir):
    return load_file(shared_dir / "golden" / "agmm.safetensors")


def close(mine, theirs, tolerance=5e-6):
    assert mine.shape == theirs.shape
    assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize(("case", "setting"), COMPARED)
def test_the_authors_losses(golden, case, setting):
    features = golden[f"{case}/features"].requires_grad_()
    labels = golden[f"{case}/labels"].long()  # 5 is unlabelled, 255 padding
    batch = {
        "image": torch.zeros(3, 3, *labels.shape[1:]),
        "mask": labels.masked_fill(labels == 5, 255),
        "unlabelled": labels == 5,
        "image_classes": golden[f"{case}/image_classes"].bool(),
    }
    model = AGMM(5, variance=setting, features=Given(features), dropout=0.0)
    with torch.no_grad():
        model.classifier[1].weight.copy_(golden["input/classifier_weight"])
        model.classifier[1].bias.copy_(golden["input/classifier_bias"])
    losses = model.compute_loss(batch)
    losses["loss_total"] = losses["loss"]
    close(model(batch["image"]), golden[f"{case}/scores"])
    for term in COMPARED[case, setting]:
        close(losses[f"loss_{term}"], golden[f"{case}/{setting}/loss_{term}"])
        name = f"{case}/{setting}/grad_features_of_{term}"
        if name in golden:
            (gradient,) = torch.autograd.grad(losses[f"loss_{term}"], features, retain_graph=True)
            close(gradient, golden[name], 2e-5)
    if "total" in COMPARED[case, setting]:
        close(model.gaussian_map(batch), golden[f"{case}/{setting}/gaussian_map"], 1e-5)
