"""What the mixtures of CGMGM's episodes cost, beside scikit-learn's and beside the encoder."""

import warnings
from collections.abc import Iterator
from functools import partial

import torch
from measure import Row, compare, row
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor

from lightning_genseg import CGMGM
from lightning_genseg.mixtures import fit_episodes

EPISODES, COMPONENTS, DIM, ITERATIONS = 2, 3, 256, 10
SMALL = 1e-9
OBSTACLE = "products of all features with three vectors, at half of the processor's peak"


def episodes(pixels: int, share: float = 0.15) -> tuple[Tensor, Tensor]:
    """Features after a ReLU, each class from three overlapping heaps, and 0/1 weights B x 2 x N."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    centres = 0.4 * normal(EPISODES, 2 * COMPONENTS, DIM)
    foreground = torch.rand(EPISODES, pixels, generator=generator) < share
    heap = torch.randint(COMPONENTS, (EPISODES, pixels), generator=generator)
    heap = heap + COMPONENTS * ~foreground
    # Channels go together, as in a network: heaps that are less clear than independent ones.
    noise = normal(EPISODES, pixels, 16) @ (0.3 * normal(16, DIM)) + normal(EPISODES, pixels, DIM)
    x = centres[torch.arange(EPISODES)[:, None], heap] + noise
    return x.relu(), torch.stack([foreground, ~foreground], 1).float()


def reference(
    x: Tensor, weights: Tensor, means: Tensor, variances: Tensor, tolerance: float = 0.0
) -> list[GaussianMixture]:
    """Scikit-learn's mixtures of every episode and class; the weights are 0 and 1."""
    mixtures = []
    for features, *per_class in zip(x, weights.bool(), means, variances, strict=True):
        for inside, mean, variance in zip(*per_class, strict=True):
            pixels = features[inside].numpy()
            model = GaussianMixture(
                COMPONENTS,
                covariance_type="diag",
                weights_init=[1 / COMPONENTS] * COMPONENTS,
                means_init=mean.numpy(),
                precisions_init=1 / variance.numpy(),
                max_iter=ITERATIONS,
                tol=tolerance,
                reg_covar=SMALL if x.dtype == torch.float64 else 1e-6,
                random_state=0,
            )
            mixtures.append(model.fit(pixels))
    return mixtures


def episodic_em(repeats: int) -> Iterator[Row]:
    """From the same start, for ten iterations or until they have converged, on the CPU.

    Ours includes finding the start, which scikit-learn is given. Its posterior is of a fit without
    prior, in float64, which scikit-learn can repeat.
    """
    warnings.simplefilter("ignore", ConvergenceWarning)
    for side in (25, 60):
        x, weights = episodes(2 * side**2)
        start = fit_episodes(x, weights, COMPONENTS, 0, SMALL, SMALL)
        begin = (
            start.means * start.scale[:, None] + start.centre[:, None],
            start.covariances * start.scale[:, None].square(),
        )
        ours = partial(fit_episodes, x, weights, COMPONENTS, ITERATIONS)
        what = f"an episode's mixtures, {side} x {side} x {DIM}: scikit-learn's EM over ours"
        times = compare(ours, partial(reference, x, weights, *begin), repeats)
        yield row(f"{what}, ten iterations", times, "≥ 5", inverse=True, obstacle=OBSTACLE)
        times = compare(ours, partial(reference, x, weights, *begin, 1e-3), repeats)
        yield row(f"{what}, its tolerance of 1e-3", times, "≥ 5", inverse=True, obstacle=OBSTACLE)
    x, weights = x.double(), weights.double()
    plain = fit_episodes(x, weights, COMPONENTS, ITERATIONS, SMALL, SMALL)
    mine = plain.log_density(x)
    theirs = reference(x, weights, *(part.double() for part in begin))
    worst = 0.0
    for b in range(EPISODES):
        each = [torch.from_numpy(m.score_samples(x[b].numpy())) for m in theirs[2 * b : 2 * b + 2]]
        # Of the tempered posterior, which the method uses: the densities are of 256 dimensions.
        both = [
            (ratio / DIM).sigmoid() for ratio in (each[0] - each[1], mine[b, :, 0] - mine[b, :, 1])
        ]
        worst = max(worst, float((both[0] - both[1]).abs().max()))
    what = "largest difference of the posterior from that of scikit-learn's mixtures"
    yield Row(what, worst, "≤ 0.001", "mean over the channels")


def episode_share(repeats: int, device: str) -> Iterator[Row]:
    """EM's part of an episode of 473 x 473 pixels: ResNet-50, one support, without base learner."""
    model = CGMGM(encoder="tu-resnet50s", ensemble=False).eval().to(device)
    image, mask = torch.rand(2, 3, 473, 473, device=device), torch.zeros(473, 473, device=device)
    mask[100:300, 100:300] = 1
    x, weights = (part[:1].to(device) for part in episodes(2 * 60**2))

    def episode() -> None:
        model.set_support(image[:1], [mask], size=473)
        model(image[1:])

    with torch.inference_mode():
        em = partial(fit_episodes, x, weights, COMPONENTS, ITERATIONS)
        times = compare(em, episode, max(2, repeats // 3), device)
    yield row("CGMGM's EM over a whole episode, ResNet-50, 473 x 473", times, "≤ 0.1")
