"""What the mixtures of CGMGM's episodes cost, against scikit-learn on the same pixels.

    python experiments/benchmarks/episodic_em.py          # a minute or two on two cores
    python experiments/benchmarks/episodic_em.py --quick  # small sizes, seconds

Eight episodes, foreground and background, M = 3 components in D = 256 dimensions, the pixels of one
support and one query. Ours fits the sixteen mixtures in one pass (`fit_episodes`, float32);
scikit-learn's `GaussianMixture` fits them one after the other, from where ours starts, for the same
ten iterations. It has no prior and no common unit of the channels, so that the comparison of what
is reached runs ours without them as well (kappa and floor next to nothing); the time is that of the
method as it is used, and of the same without a prior.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor

from lightning_genseg.mixtures import fit_episodes

EPISODES, COMPONENTS, DIM, ITERATIONS = 8, 3, 256, 10
SMALL = 1e-9


def episodes(pixels: int, share: float = 0.15) -> tuple[Tensor, Tensor]:
    """Features after a ReLU, each class from three heaps, and 0/1 weights B x 2 x N."""
    generator = torch.Generator().manual_seed(0)
    centres = 1.5 * torch.rand(EPISODES, 2 * COMPONENTS, DIM, generator=generator)
    foreground = torch.rand(EPISODES, pixels, generator=generator) < share
    heap = torch.randint(COMPONENTS, (EPISODES, pixels), generator=generator)
    heap = heap + COMPONENTS * ~foreground
    noise = torch.randn(EPISODES, pixels, DIM, generator=generator)
    x = centres[torch.arange(EPISODES)[:, None], heap] + noise
    return x.relu(), torch.stack([foreground, ~foreground], 1).float()


def reference(x: Tensor, weights: Tensor, means: Tensor, variances: Tensor) -> list[float]:
    """Log-likelihood per pixel of every episode and class; the weights are 0 and 1."""
    scores = []
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
                tol=0.0,
                reg_covar=SMALL if x.dtype == torch.float64 else 1e-6,
                random_state=0,
            )
            scores.append(float(model.fit(pixels).score(pixels)))
    return scores


def seconds(function: Callable[[], object], repetitions: int) -> float:
    function()
    times = []
    for _ in range(repetitions):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    sizes = (24,) if arguments.quick else (25, 60)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(
        "| feature map | pixels | ours, s an episode | without prior | scikit-learn | faster | "
        "log-likelihood ours | scikit-learn |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for side in sizes:
        x, weights = episodes(2 * side**2)
        start = fit_episodes(x, weights, COMPONENTS, 0, SMALL, SMALL)
        means = start.means * start.scale[:, None] + start.centre[:, None]
        begin = means, start.covariances * start.scale[:, None].square()
        plain = fit_episodes(x.double(), weights.double(), COMPONENTS, ITERATIONS, SMALL, SMALL)
        density = plain.log_density(x.double()).transpose(1, 2)
        ours = (density * weights).sum(2) / weights.sum(2)
        theirs = reference(x.double(), weights, *(part.double() for part in begin))
        repetitions = arguments.repetitions
        ours_fit = partial(fit_episodes, x, weights, COMPONENTS, ITERATIONS)
        used = seconds(ours_fit, repetitions)
        bare = seconds(partial(ours_fit, SMALL, SMALL), repetitions)
        other = seconds(partial(reference, x, weights, *begin), repetitions)
        print(
            f"| {side} x {side} | {2 * side**2} | {used / EPISODES:.3f} | {bare / EPISODES:.3f} | "
            f"{other / EPISODES:.3f} | {other / used:.1f} | {ours.mean():.4f} | "
            f"{statistics.mean(theirs):.4f} |"
        )


if __name__ == "__main__":
    main()
