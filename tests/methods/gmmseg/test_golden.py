"""EM steps of the authors' head, number for number (tests/golden/make.py says what these are)."""

import pytest
import torch
import torch.nn.functional as F

from lightning_genseg import GMMHead
from lightning_genseg.mixtures.memory import FeatureRing
from tests.golden.compare import close

C, M, D = 7, 3, 16


@pytest.fixture(scope="module")
def golden(golden_of):
    return golden_of("gmmseg")


def authors_head(golden, run, size, samples):
    """Ours at their settings, in the state in which theirs begins."""
    head = GMMHead(
        D,
        C,
        mixture={"components": M, "embedding_dim": None},
        em={
            "memory": "ring",
            "memory_size": size,
            "memory_filter": "correct",
            "samples_per_component": samples,
        },
        dropout=0.0,
        avg_non_ignore=False,
    )
    with torch.no_grad():
        for name in ("feature_norm", "logit_norm"):
            getattr(head, name).weight.copy_(golden[f"initial/{name}_weight"])
            getattr(head, name).bias.copy_(golden[f"initial/{name}_bias"])
        head.mixture.means.copy_(golden["initial/means"])
        head.mixture.log_variances.copy_(golden["initial/variances"].log())
    assert isinstance(head.memory, FeatureRing)
    groups = torch.arange(C * M).repeat_interleave(size)
    head.memory.push(golden[f"{run}/initial_ring"].flatten(0, 1), groups)
    return head


@pytest.mark.parametrize(("run", "size", "samples"), [("all", 64, 10_000), ("sampled", 32, 6)])
def test_the_authors_head(golden, run, size, samples):
    if f"{run}/initial_ring" not in golden:
        pytest.skip("in the whole file only")
    head = authors_head(golden, run, size, samples)
    for step, features in enumerate(golden["input/features"]):
        there = {
            name.removeprefix(f"{run}/step{step}/"): value
            for name, value in golden.items()
            if name.startswith(f"{run}/step{step}/")
        }
        features = features.clone().requires_grad_()
        labels = golden["input/labels"][step].long()
        close(head.mixture.centres, there["means_used"])
        losses = head.compute_loss(features, labels)
        close(losses["loss_ce"], there["ce_mean_all"])
        close(losses["loss_component"], there["component_loss"])
        assigned = losses["assignment"].masked_fill(losses["assignment"] == C * M, 255)
        assert torch.equal(assigned, there["assignment"].long())
        if run == "all" or step == 0:  # both begin alike
            compare_maps(head, features, losses, golden, f"all/step{step}")
        with torch.no_grad():
            correct = head(features).argmax(1).flatten() == labels.flatten()
        assert torch.equal(correct, there["enters_memory"].bool())
        labelled = (labels != 255).sum()
        close(losses["loss_ce"] * labels.numel() / labelled, there["ce_mean_labelled"])

        head.update_mixture(losses["embedding"], labels, losses["assignment"])
        # They normalise the means of an absent class where they lie, we where they are used.
        close(head.mixture.centres, F.normalize(there["means_after_update"], dim=-1))
        close(head.mixture.log_variances.exp(), there["variances_after_update"])
        assert torch.equal(head.memory.entered[:-1] % size, there["ring_pointer"].long())
        if "ring" in there:
            close(head.memory.features[:-1].view(C * M, size, D), there["ring"])


def compare_maps(head, features, losses, golden, prefix):
    there = {name.removeprefix(f"{prefix}/"): value for name, value in golden.items()}
    close(losses["embedding"], there["embedding"])
    components = head.component_log_density(losses["embedding"])
    close(components, there["component_log_density"])
    close(components.amax(2), there["class_log_density_max"])
    logits = head(features)
    close(logits, there["logits"])
    parts = {"ce_mean_all": losses["loss_ce"], "component": losses["loss_component"]}
    for name, loss in parts.items():
        (gradient,) = torch.autograd.grad(loss, features, retain_graph=True)
        close(gradient, there[f"grad_features_of_{name}"], 2e-5)
    for name in ("feature_norm", "logit_norm"):
        weight = getattr(head, name).weight
        (gradient,) = torch.autograd.grad(losses["loss_ce"], weight, retain_graph=True)
        close(gradient, there[f"grad_{name}_weight_of_ce_mean_all"], 2e-5)


def test_labels_at_the_size_of_the_map(golden):
    head = GMMHead(D, C, em={"label_reduction": "corner", "memory_size": 1})
    labels = head.labels(golden["label_reduction/labels_32x32"].long(), torch.zeros(1, D, 8, 8))
    assert torch.equal(labels.view(1, 8, 8), golden["label_reduction/authors_8x8"].long())


def test_a_memory_that_starts_full_of_random_unit_vectors():
    head = GMMHead(D, C, em={"memory": "ring", "memory_size": 5, "memory_start": "random"})
    head.memory_state()  # what only predicts does without
    estimate = head.memory.moments().estimate()
    assert (estimate.counts == 5).all()
    torch.testing.assert_close(head.memory.features[:-1].norm(dim=1), torch.ones(5 * C * 5))
