"""Gaussian maps and the losses of AGMM, against their formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_genseg.methods.agmm.gaussian_map import (
    centre_distance,
    centre_similarity,
    chosen,
    class_centres,
    gaussian_map,
    gaussian_variance,
)
from lightning_genseg.methods.agmm.losses import absent_class_loss, class_agreement_loss
from tests.contract import Operations

CLASSES = 4


def features_of(batch: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 5, 6, 8, dtype=dtype).requires_grad_()


def sparse_mask() -> Tensor:
    """Three images of 24 x 32: points at corners and borders, a block, nothing."""
    mask = torch.full((3, 24, 32), 255)
    mask[0, 0, 0] = mask[0, 23, 31] = 1
    mask[0, 7, 0] = mask[0, 23, 12] = mask[0, 5, 9] = 3
    mask[1, 4:9, 10:21] = 0
    mask[1, 20, 20] = 2
    return mask


# --- centres ---------------------------------------------------------------------------------


def test_centres_are_the_means_of_enlarged_features_and_so_are_their_gradients():
    features, mask = features_of(), sparse_mask()
    centres, present = class_centres(features, mask, CLASSES)
    large = F.interpolate(features, mask.shape[-2:], mode="bilinear")
    expected = torch.zeros(3, CLASSES, 5, dtype=torch.float64)
    for b in range(3):
        for c in range(CLASSES):
            if (mask[b] == c).any():
                expected[b, c] = large[b][:, mask[b] == c].mean(1)
    torch.testing.assert_close(centres, expected)
    assert present.tolist() == [
        [False, True, False, True], [True, False, True, False], [False] * 4,
    ]  # fmt: skip
    weights = torch.randn_like(expected)
    mine, theirs = (
        torch.autograd.grad((x * weights).sum(), features)[0] for x in (centres, expected)
    )
    torch.testing.assert_close(mine, theirs)


def test_half_precision_features_have_full_precision_centres():
    features = features_of(dtype=torch.float32).detach()
    exact = class_centres(features.bfloat16().float(), sparse_mask(), CLASSES)[0]
    centres = class_centres(features.bfloat16(), sparse_mask(), CLASSES)[0]
    assert centres.dtype == torch.float32
    assert torch.equal(centres, exact)


# --- distances -------------------------------------------------------------------------------


def test_distance_is_the_mean_absolute_difference():
    features = features_of()
    centres = torch.randn(3, CLASSES, 5, dtype=torch.float64, requires_grad=True)
    present = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])
    distance = centre_distance(features, centres, present)
    expected = (features[:, None] - centres[..., None, None]).abs().mean(2)
    expected = expected * present[:, :, None, None]
    torch.testing.assert_close(distance, expected)
    weights = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad((distance * weights).sum(), (features, centres)),
        torch.autograd.grad((expected * weights).sum(), (features, centres)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_no_tensor_of_all_differences():
    features = torch.randn(2, 64, 20, 20, requires_grad=True)
    mask = torch.where(torch.rand(2, 80, 80) < 0.02, torch.randint(21, (2, 80, 80)), 255)
    with Operations() as seen:
        centres, present = class_centres(features, mask, 21)
        gaussian_map(centre_distance(features, centres, present), present).sum().backward()
    assert features.grad is not None
    assert seen.largest == 2 * 21 * 80 * 80  # where each class is labelled


def test_the_gradient_of_the_distance_is_taken_in_parts(monkeypatch):
    """As on a GPU, where it holds pixels x classes x channels at once."""
    sizes: list[int] = []
    cdist = torch.cdist

    def spy(own: Tensor, pixels: Tensor, p: float) -> Tensor:
        sizes.append(len(own) * len(pixels) * own.shape[1])
        return cdist(own, pixels, p=p)

    features, centres = features_of(), torch.randn(3, CLASSES, 5, dtype=torch.float64)
    present = torch.tensor([[True, True, False, True], [False] * 4, [True] * 4])
    whole = centre_distance(features, centres, present)
    gradient = torch.autograd.grad(whole.square().sum(), features)[0]
    monkeypatch.setattr("lightning_genseg.methods.agmm.gaussian_map._MAX_DIFFERENCES", 200)
    monkeypatch.setattr(torch, "cdist", spy)
    parts = centre_distance(features, centres, present)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts.square().sum(), features)[0], gradient)
    assert len(sizes) > 8
    assert max(sizes) <= 200


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_tensor_of_all_differences_on_a_gpu():
    features = torch.randn(1, 256, 128, 256, device="cuda", requires_grad=True)
    centres = torch.randn(1, 20, 256, device="cuda", requires_grad=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    present = torch.ones(1, 20, dtype=torch.bool, device="cuda")
    centre_distance(features, centres, present).sum().backward()
    all_differences = 4 * 20 * features.numel()
    assert torch.cuda.max_memory_allocated() - before < all_differences / 2


# --- Gaussians -------------------------------------------------------------------------------


def test_map_is_one_at_a_centre_and_zero_for_absent_classes():
    features, present = features_of().detach(), torch.tensor([[True, True, False, True]] * 3)
    centres = torch.randn(3, CLASSES, 5, dtype=torch.float64)
    centres[:, 1] = features[:, :, 2, 3]
    distance = centre_distance(features, centres, present)
    uniform = torch.ones(3, 1, 6, 8, dtype=torch.float64)
    for variance in (None, gaussian_variance(distance, uniform)):
        gaussian = gaussian_map(distance, present, variance)
        assert ((gaussian >= 0) & (gaussian <= 1)).all()
        assert (gaussian[:, 1, 2, 3] == 1).all()
        assert (gaussian[:, 2] == 0).all()
        assert (gaussian[:, [0, 1, 3]].flatten(2).amax(2) > 0).all()
        assert ((gaussian == 1).sum((2, 3))[:, 1] == 1).all()


def test_variance_is_the_weighted_mean_square_without_gradient():
    distance = torch.rand(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    variance = gaussian_variance(distance, weights)
    assert not variance.requires_grad
    assert variance.shape == (2, 3, 1, 1)
    square = distance[1, 2].detach() ** 2
    assert variance[1, 2].item() == pytest.approx(
        (weights[1, 2] * square).sum().item() / weights[1, 2].sum().item(), rel=1e-5
    )
    assert (gaussian_variance(distance, torch.zeros(2, 1, 4, 5)) == 0).all()


def test_an_adaptive_map_does_not_know_the_scale_of_the_features():
    features, mask = features_of().detach(), sparse_mask()
    maps = []
    for scale in (1, 100):
        centres, present = class_centres(scale * features, mask, CLASSES)
        distance = centre_distance(scale * features, centres, present)
        variance = gaussian_variance(distance, torch.ones(3, 1, 6, 8))
        maps.append(gaussian_map(distance, present, variance))
    torch.testing.assert_close(maps[0], maps[1], rtol=1e-4, atol=1e-5)
    # exp(-1/2) at the mean squared distance.
    assert 0.5 < maps[0][0, 1].mean() < 0.75


def test_features_that_are_all_alike_have_finite_gradients():
    features = torch.ones(1, 5, 6, 8, requires_grad=True)
    mask = sparse_mask()[:1]
    centres, present = class_centres(features, mask, CLASSES)
    distance = centre_distance(features, centres, present)
    variance = gaussian_variance(distance, torch.ones(1, 1, 6, 8))
    gaussian = gaussian_map(distance, present, variance)
    assert (gaussian[0, [1, 3]] == 1).all()
    (gaussian.sum() + centre_similarity(centres[0], present[0])).backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()


# --- contrast --------------------------------------------------------------------------------


def test_similarity_of_centres():
    centres = torch.tensor([[0.0, 0.0], [9.0, 9.0], [1.0, 3.0], [2.0, 0.0]])
    present = torch.tensor([True, False, True, True])
    distances = torch.tensor([2.0, 1.0, 2.0])  # of classes 0 2, 0 3, 2 3
    expected = torch.exp(-(distances**2)).mean()
    torch.testing.assert_close(centre_similarity(centres, present), expected)
    assert centre_similarity(centres, torch.tensor([True, False, False, False])) == 0
    assert centre_similarity(centres, torch.zeros(4, dtype=torch.bool)) == 0


# --- losses ----------------------------------------------------------------------------------


def test_agreement_is_half_the_binary_cross_entropy_of_the_classes_that_count():
    prediction, target = (torch.rand(6, CLASSES, 2, 3, dtype=torch.float64) for _ in range(2))
    prediction.clamp_(0.05, 0.95)
    present, pixels = torch.rand(6, CLASSES) < 0.6, torch.rand(6, 2, 3) < 0.7
    present[0] = False
    single = F.binary_cross_entropy(prediction, target, reduction="none")
    terms = [
        0.5 * single[i, present[i], y, x].mean().item() if present[i].any() else 0.0
        for i, y, x in pixels.nonzero().tolist()
    ]
    maps = (chosen(x, present) for x in (prediction, target))
    loss = class_agreement_loss(*maps, present, pixels)
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-4)


def test_absent_classes_cost_what_they_are_given():
    probability = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.9, 0.0]], dtype=torch.float64)
    present = torch.tensor([[True, False, False], [True, True, True]])
    expected = -2 * torch.tensor(0.75, dtype=torch.float64).log() / 2
    maps = probability[..., None, None].expand(-1, -1, 1, 2)
    pixels = torch.tensor([[[True, False]]] * 2)
    loss = absent_class_loss(maps, present, pixels)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("certain", [0.0, 1.0])
def test_losses_of_certain_maps_are_finite(certain):
    prediction = torch.full((3, CLASSES, 2, 2), certain, requires_grad=True)
    target = torch.full((3, CLASSES, 2, 2), 1 - certain, requires_grad=True)
    everything, pixels = torch.ones(3, CLASSES) > 0, torch.ones(3, 2, 2) > 0
    maps = (chosen(x, everything) for x in (prediction, target))
    loss = class_agreement_loss(*maps, everything, pixels)
    loss = loss + absent_class_loss(prediction, ~everything, pixels)
    loss.backward()
    for x in (loss, prediction.grad, target.grad):
        assert x.isfinite().all()
    assert loss > 1


def test_losses_of_no_pixel_are_zero():
    maps, present = torch.rand(2, CLASSES, 3, 3, requires_grad=True), torch.ones(2, CLASSES) > 0
    pixels = torch.zeros(2, 3, 3, dtype=torch.bool)
    of_classes = chosen(maps, present)
    loss = class_agreement_loss(of_classes, of_classes, present, pixels)
    loss = loss + absent_class_loss(maps, ~present, pixels)
    loss.backward()
    assert loss == 0
