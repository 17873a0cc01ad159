"""BAM's authors' own results, number for number (tests/golden/make.py says what these are)."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_genseg import CGMGM
from lightning_genseg.methods.fewshot import base
from lightning_genseg.methods.fewshot.cgmgm import _Episodes
from lightning_genseg.methods.fewshot.networks import (
    PyramidPooling,
    ShotWeights,
    StageFeatures,
    gram_distance,
)
from lightning_genseg.methods.fewshot.published import load_published, our_names
from lightning_genseg.methods.fewshot.support import support_shares
from lightning_genseg.ops.resize import resize_aligned
from tests.golden.compare import close

CASES = ("one_shot", "letterboxed", "five_shot", "five_shot_without_biases")
BASE_CLASSES, WIDTH = 4, 8
# The files have zeros; these are what their `weights_with_biases` follow from.
BIASES = {
    "kshot_rw.0.bias": torch.tensor([0.3, 0.2]),
    "kshot_rw.2.bias": torch.tensor([0.5, -0.5, 0.0, -0.3, 0.4]),
}


class Stages(nn.Module):
    """The stand-in for a backbone with which theirs ran."""

    channels = (12, 16, 24)

    def __init__(self, encoder, encoder_weights, output_stride):
        super().__init__()
        layers = ((3, 12, 8), (12, 16, 1), (16, 24, 1))
        parts = {
            f"layer{number}": nn.Sequential(nn.Conv2d(i, o, 3, s, padding=1), nn.ReLU())
            for number, (i, o, s) in enumerate(layers, 2)
        }
        self.encoder = nn.ModuleDict(parts)

    def forward(self, image):
        low = self.encoder["layer2"](image)
        mid = self.encoder["layer3"](low)
        return StageFeatures(low, mid, self.last(mid))

    def last(self, mid):
        return self.encoder["layer4"](mid)


@pytest.fixture(scope="module")
def golden(golden_of):
    return golden_of("bam")


@pytest.fixture
def bam(golden, monkeypatch, tmp_path):
    """BAM with their weights, as a function of the case."""

    def make(case):
        monkeypatch.setattr(base, "EncoderStages", Stages)
        model = CGMGM(
            encoder="stand-in",
            num_base_classes=BASE_CLASSES,
            shots=golden[f"{case}/style_distance_of_each_shot"].shape[1],
            guidance="prior",
            matching={"mask_before_last_stage": True},
            decoder={"extra_inputs": ["prototype"], "shared_reduction": False, "width": WIDTH},
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
        )
        classifier = nn.Sequential(nn.Dropout2d(), nn.Conv2d(10, 1 + BASE_CLASSES, 1))
        model.base_head = nn.Sequential(PyramidPooling(24, 10), classifier).requires_grad_(False)
        published = {name: golden[name] for name in golden if name.startswith("weights/")}
        if model.shot_weights.shots > 1:
            published |= {n: golden[n] for n in golden if n.startswith("weights_five_shot/")}
        published = {f"module.{n.partition('/')[2]}": value for n, value in published.items()}
        biases = BIASES
        if case == "five_shot_without_biases":
            biases = {name: torch.zeros_like(value) for name, value in biases.items()}
        if model.shot_weights.shots > 1:
            published |= {f"module.{name}": value for name, value in biases.items()}
        save_file(published, tmp_path / "published.safetensors")
        load_published(model, tmp_path / "published.safetensors")
        return model.eval()

    return make


def batch_of(golden, case):
    case = case.removesuffix("_without_biases")
    batch = {
        name.removeprefix(f"{case}/"): value.long() if value.dtype == torch.uint8 else value
        for name, value in golden.items()
        if name.startswith(f"{case}/")
    }
    size = batch["valid"].shape[-1]
    for name in ("image", "support_image"):  # the padding, of one colour, may be left out
        for axis in (-2, -1):
            places = torch.arange(size).clamp_max(batch[name].shape[axis] - 1)
            batch[name] = batch[name].index_select(axis, places)
    return batch


@pytest.mark.parametrize("case", CASES)
def test_the_authors_network(golden, bam, case):
    if f"{case}/final" not in golden:
        pytest.skip("in the whole file only")
    model, batch = bam(case), batch_of(golden, case)
    theirs = {n.removeprefix(f"{case}/"): v for n, v in golden.items() if n.startswith(f"{case}/")}
    inputs = []
    model.decoder.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    with torch.no_grad():
        outputs = model.episode_outputs(batch)
        query = model.extract_stages(batch["image"])
        support = model.extract_stages(batch["support_image"].flatten(0, 1))
        base_scores = model.base_head(query.high)
    for name in ("meta", "final"):
        scores = outputs["scores" if name == "final" else name]
        close(model.to_image(scores, batch["image"]), theirs[name])
    close(outputs["prior"], theirs["prior"])
    close(inputs[0][:, 1 + WIDTH :, 0, 0], theirs["prototype"])
    close(model._known(query.high, batch), theirs["probability_of_any_base_class"])

    count, shots = batch["support_image"].shape[:2]
    lows = support.low.unflatten(0, (count, shots)).unbind(1)
    distances = torch.stack([gram_distance(query.low, low) for low in lows], 1)
    close(distances, theirs["style_distance_of_each_shot"])
    weights = model.shot_weights(distances)
    close(weights, theirs["shot_weights"])
    close((weights * distances).sum(1), theirs["style_distance"])
    shares = support_shares(batch, support.mid.shape[-2:])
    valid = torch.ones_like(outputs["prior"], dtype=torch.bool)
    for shot in range(shots):
        alone = torch.eye(shots)[shot].expand(count, -1)
        prior = model._prior(_Episodes(query, valid, support, shares, alone))
        close(prior[:, 0], theirs["prior_of_each_shot"][:, shot])
    if "base" in theirs:
        close(model.to_image(base_scores, batch["image"]), theirs["base"])
        for name, part in zip(("layer2", "layer3", "layer4"), query, strict=True):
            close(part, theirs[f"query_{name}"])
        mask = shares[:, :, :1].flatten(0, 1)
        masked = model.features.last(support.mid * mask).unflatten(0, (count, shots))
        close(masked, theirs["support_layer4_masked"])


def test_the_authors_losses_and_gradients(golden, bam):
    there = {n.removeprefix("one_shot/train/"): v for n, v in golden.items() if "/train/" in n}
    if not there:
        pytest.skip("in the whole file only")
    model, batch = bam("one_shot").train(), batch_of(golden, "one_shot")
    for part in model.modules():
        if isinstance(part, nn.Dropout2d):
            part.p = 0.0
    batch["base_index"] = there["base_class_of_episode"] + 1
    losses = model.compute_loss(batch)
    close(losses["loss_final"], there["loss_final"])
    close(losses["loss_meta"], there["loss_meta"])
    losses["loss"].backward()
    grads = {n.removeprefix("grad/"): v for n, v in there.items() if n.startswith("grad/")}
    assert len(grads) == 5
    for name, gradient in our_names(grads, model).items():
        close(model.get_parameter(name).grad, gradient, 2e-5)


def test_the_authors_weights_of_shots(golden):
    weights, distances = ShotWeights(5), golden["shot_weights/distances"]
    with torch.no_grad():
        for index in (0, 2):
            own = weights.layers[index]
            own.weight.copy_(golden[f"weights_five_shot/kshot_rw.{index}.weight"].flatten(1))
            own.bias.copy_(BIASES[f"kshot_rw.{index}.bias"])
        close(weights(distances), golden["shot_weights/weights_with_biases"])
        weights.layers[0].bias.zero_()
        weights.layers[2].bias.zero_()
        close(weights(distances), golden["shot_weights/weights_without_biases"])


def test_only_the_cells_of_the_image(golden, bam):
    model, batch = bam("letterboxed"), batch_of(golden, "letterboxed")
    model.matching = type(model.matching)(mask_before_last_stage=True, prior_cells="valid")
    prior = model.episode_outputs(batch)["prior"]
    inside = resize_aligned(batch["valid"][:, None].float(), prior.shape[-2:]) > 0.5
    assert (prior[~inside] == 0).all()
    assert prior.masked_fill(~inside, 1).amin((1, 2, 3)).tolist() == [0] * len(prior)
    assert prior.amax((1, 2, 3)).min() > 0.999
