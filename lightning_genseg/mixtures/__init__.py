"""The shared mathematics: Gaussian mixtures, EM, Sinkhorn, memories. Plain torch."""

from lightning_genseg.mixtures.densities import Mixture, own_class
from lightning_genseg.mixtures.em import Assignment, e_step, estimate, fit, m_step
from lightning_genseg.mixtures.episodic import EpisodicMixture, fit_episodes
from lightning_genseg.mixtures.gaussian import Covariance, GaussianMixture, MeanStart
from lightning_genseg.mixtures.log_density import (
    diagonal_log_density,
    full_log_density,
    full_precision,
)
from lightning_genseg.mixtures.memory import (
    DecayedMoments,
    Estimate,
    FeatureRing,
    Moments,
    spread_evenly,
)
from lightning_genseg.mixtures.sinkhorn import sinkhorn
from lightning_genseg.ops.processes import Processes

__all__ = [
    "Assignment",
    "Covariance",
    "DecayedMoments",
    "EpisodicMixture",
    "Estimate",
    "FeatureRing",
    "GaussianMixture",
    "MeanStart",
    "Mixture",
    "Moments",
    "Processes",
    "diagonal_log_density",
    "e_step",
    "estimate",
    "fit",
    "fit_episodes",
    "full_log_density",
    "full_precision",
    "m_step",
    "own_class",
    "sinkhorn",
    "spread_evenly",
]
