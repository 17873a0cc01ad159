"""The head against a plain reference with loops, on hostile data, and learning."""

import copy
from collections import deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributions import Independent, Normal

from lightning_genseg import GMMHead
from lightning_genseg.errors import GenSegError
from lightning_genseg.mixtures import Processes
from tests.contract import Operations, copied, in_groups
from tests.mixtures.processes import run_processes
from tests.mixtures.test_sinkhorn import plain as plain_sinkhorn

RAW = {"in_channels": 2, "num_classes": 2, "embedding_dim": None, "normalize_features": False}
BIG = {"memory_size": 1000, "samples_per_component": 1000}  # nothing is left out or forgotten


def make_head(**options):
    """A small head; the fields of its groups are given by their own names."""
    defaults = {"in_channels": 6, "num_classes": 3, "embedding_dim": 4}
    defaults |= {"memory": "ring", "memory_size": 40}
    defaults["dropout"] = 0.0  # so that a step can be computed again
    return GMMHead(**in_groups(**defaults | options))


def make_batch(classes=3, size=8, channels=6, stride=4, count=2):
    """Features that tell the class, and a mask at image resolution with an ignored border."""
    small = torch.randint(classes, (count, size, size))
    features = torch.randn(count, channels, size, size)
    centres = torch.randn(classes, channels, generator=torch.Generator().manual_seed(5))
    features = features + 2 * centres[small].movedim(-1, 1)
    mask = small.repeat_interleave(stride, 1).repeat_interleave(stride, 2)
    mask[:, : 2 * stride] = 255
    return features, mask


def embedded(head, **options):
    """An embedding and its mask."""
    features, mask = make_batch(**options)
    return head.embed(features).detach(), mask


def step(head, features, mask, **options):
    losses = head.compute_loss(features, mask)
    head.update_mixture(losses["embedding"], mask, losses["assignment"], **options)
    return losses


def rows(maps):
    """B x D x h x w to N x D."""
    return maps.movedim(1, -1).flatten(0, 2)


def counts_of(head):
    """Features in the memory, of each class."""
    return head.memory.moments().counts.view(head.num_classes, -1).sum(1)


def assert_same_state(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=0)


def assert_same_memory(mine, theirs, **tolerance):
    for a, b in zip(mine.memory.moments(), theirs.memory.moments(), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


# --- scores and losses -----------------------------------------------------------------------


def plain_densities(head, embedding):
    """torch.distributions, pixel by component by dimension: N x C x M."""
    x, mixture = rows(embedding)[:, None, None], head.mixture
    return Independent(Normal(mixture.centres, mixture.variances.sqrt()), 1).log_prob(x)


@pytest.mark.parametrize("density", ["max", "logsumexp"])
@pytest.mark.parametrize("logit_norm", ["layernorm", "none"])
def test_scores_equal_torch_distributions(density, logit_norm):
    head = make_head(components=3, density=density, logit_norm=logit_norm).eval()
    head.mixture.log_variances.copy_(-torch.rand(3, 3, 4))
    features, _ = make_batch()
    embedding = head.embed(features)
    alive = (head.projection(features) > 0).any(1)  # where all of its few ReLUs are zero, zero
    torch.testing.assert_close(embedding.norm(dim=1), alive.float())
    plain = plain_densities(head, embedding) - torch.tensor(3.0).log()
    expected = plain.amax(2) if density == "max" else plain.logsumexp(2)
    logits, anomaly = head.scores(embedding)
    torch.testing.assert_close(anomaly, -expected.amax(1).view(2, 1, 8, 8))
    if logit_norm == "layernorm":
        expected = F.layer_norm(expected, (3,))
    torch.testing.assert_close(rows(logits), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head(features), logits)


def test_the_gain_of_the_logit_norm_does_not_touch_the_anomaly_score():
    head, strong = make_head(), make_head(logit_scale=4.0)
    strong.mixture.load_state_dict(head.mixture.state_dict())
    embedding, _ = embedded(head)
    (logits, anomaly), (strong_logits, same) = head.scores(embedding), strong.scores(embedding)
    torch.testing.assert_close(strong_logits, 4 * logits)
    torch.testing.assert_close(anomaly, same, rtol=0, atol=0)


def test_losses_equal_the_plain_ones():
    head = make_head(components=3, component_loss_weight=0.5)
    features, mask = make_batch()
    losses = head.compute_loss(features, mask)
    density = plain_densities(head, losses["embedding"])
    logits = F.layer_norm(density.amax(2), (3,)).view(2, 8, 8, 3).movedim(-1, 1)
    large = F.interpolate(logits, (32, 32), mode="bilinear")
    labels = mask[:, ::4, ::4].flatten()
    own = density[torch.arange(128), labels % 255]
    target = plain_sinkhorn(own, labels).argmax(1) + 3 * labels
    valid = labels < 255
    assert torch.equal(losses["assignment"], torch.where(valid, target, 9))
    expected = {
        "loss_ce": F.cross_entropy(large, mask, ignore_index=255),
        "loss_component": F.cross_entropy(density.flatten(1)[valid], target[valid]),
    }
    expected["loss"] = expected["loss_ce"] + 0.5 * expected["loss_component"]
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-5)


def test_the_mean_is_over_labelled_pixels_or_over_all():
    features, mask = make_batch()
    losses = []
    for labelled_only in (True, False):
        torch.manual_seed(0)
        head = make_head(avg_non_ignore=labelled_only)
        losses.append(head.compute_loss(features, mask)["loss_ce"])
    torch.testing.assert_close(losses[1], losses[0] * (mask != 255).float().mean())


@pytest.mark.parametrize("size", [(5, 7), (19, 27), (3, 2)])
def test_any_mask_size(size):
    features, mask = torch.randn(1, 6, 5, 7), torch.randint(3, (1, *size))
    assert step(make_head(), features, mask)["loss"].isfinite()


def test_masks_of_any_kind():
    head = make_head()
    features, mask = make_batch()
    expected = head.compute_loss(features, mask)["loss"]
    for other in (mask[:, None], mask.to(torch.uint8), mask.float()):
        assert torch.equal(head.compute_loss(features, other)["loss"], expected)
    embedding = head.embed(features)
    with pytest.raises(GenSegError, match=r"masks are \(1, 32, 32\) and the features \(2, "):
        head.update_mixture(embedding, mask[:1])


def test_the_gradient_has_no_gradient():
    head = make_head()
    features, mask = make_batch()
    loss = head.compute_loss(features.requires_grad_(), mask)["loss"]
    (gradient,) = torch.autograd.grad(loss, features, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_somebody_elses_labels():
    """Another ignore index, masks at the resolution of the features."""
    head = make_head(components=2, embedding_dim=None, ignore_index=-1)
    features = torch.randn(2, 6, 6, 6, requires_grad=True)
    mask = torch.randint(-1, 3, (2, 6, 6))
    step(head, features, mask)["loss"].backward()
    assert counts_of(head).tolist() == [(mask == c).sum().item() for c in range(3)]
    ignored = (mask == -1)[:, None].expand_as(features)
    assert features.grad.any()
    assert not features.grad[ignored].any()


@pytest.mark.parametrize("train", ["em", "gradient", "posthoc"])
def test_who_learns_by_gradient(train):
    head = make_head(train=train)
    features, mask = make_batch()
    losses = head.compute_loss(features.requires_grad_(), mask)
    losses["loss"].backward()
    assert features.grad.abs().sum() > 0
    assert head.projection[0].weight.grad.abs().sum() > 0
    assert not losses["embedding"].requires_grad
    parameters = dict(head.mixture.named_parameters())
    if train == "gradient":
        assert set(parameters) == {"means", "log_variances"}
        assert all(p.grad.abs().sum() > 0 for p in parameters.values())
        with pytest.raises(GenSegError, match="learns by gradient; there is no EM to run"):
            head.update_mixture(losses["embedding"], mask)
    else:
        assert not parameters
        assert not any(buffer.requires_grad for buffer in head.buffers())


def test_gradient_is_that_of_the_plain_densities():
    head = make_head(logit_norm="none", component_loss_weight=0).double()
    head.mixture.log_variances.copy_(-torch.rand(3, 5, 4))
    embedding = F.normalize(torch.randn(1, 4, 3, 3, dtype=torch.double), dim=1).requires_grad_()
    mine = head.scores(embedding)[0].logsumexp(1).sum()
    theirs = plain_densities(head, embedding).amax(2).logsumexp(1).sum()
    (gradient,) = torch.autograd.grad(mine, embedding)
    (expected,) = torch.autograd.grad(theirs, embedding)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_float32_densities(dtype):
    head = make_head()
    features, mask = make_batch()
    with torch.autocast("cpu", dtype):
        embedding = head.embed(features)
        density = head.component_log_density(embedding)
        scores, anomaly = head.scores(embedding)
    assert embedding.dtype == density.dtype == scores.dtype == anomaly.dtype == torch.float32
    torch.testing.assert_close(density, head.component_log_density(embedding), rtol=0, atol=0)
    with torch.autocast("cpu", dtype):
        loss = step(head, features, mask)["loss"]
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in head.parameters())
    for name, buffer in head.mixture.named_buffers():
        assert buffer.dtype == torch.float32, name
        assert buffer.isfinite().all(), name


# --- EM --------------------------------------------------------------------------------------


class PlainEM:
    """What `update_mixture` computes, by loops over classes and components and real queues."""

    def __init__(self, head):
        self.head, self.queues, self.updated = head, {}, set()
        self.means = head.mixture.means.double()
        self.variances = head.mixture.variances.double()

    def step(self, embedding, mask, remember_only=False):
        head = self.head
        labels = mask[:, 2::4, 2::4].flatten()
        x = rows(embedding).double()
        means = F.normalize(self.means, dim=-1)
        density = Independent(Normal(means, self.variances.sqrt()), 1).log_prob(x[:, None, None])
        present = [c for c in labels.unique().tolist() if c != 255]
        for c in present:
            own = x[labels == c]
            alike = torch.zeros(len(own), dtype=torch.long)
            chosen = plain_sinkhorn(density[labels == c, c], alike).argmax(1)
            for m in range(head.options.components):
                candidates = own[chosen == m]
                most, n = head.em.samples_per_component, len(candidates)
                if n > most:
                    candidates = [candidates[i * (n - 1) // (most - 1)] for i in range(most)]
                queue = self.queues.setdefault((c, m), deque(maxlen=head.memory.size))
                queue.extend(candidates)
        due = {c for c, _ in self.queues if c in present or c not in self.updated}
        self.updated |= set() if remember_only else due
        for (c, m), queue in self.queues.items():
            if remember_only or c not in due or not queue:
                continue
            momentum = head.em.mean_momentum
            memory = torch.stack(list(queue))
            mean = F.normalize(memory.sum(0), dim=0)
            self.means[c, m] = momentum * means[c, m] + (1 - momentum) * mean
            self.variances[c, m] = (memory - mean).square().mean(0) + head.options.variance_floor


def test_a_class_that_was_only_remembered_is_not_forgotten():
    """It is fitted by the next M-step, whether or not its batch has it."""
    head = make_head(num_classes=4)
    head.update_mixture(*embedded(head, classes=4), remember_only=True)
    assert not head.mixture.fitted.any()
    head.update_mixture(*embedded(head, classes=3))
    assert head.mixture.fitted.all(1).all()


def test_the_class_prior_counts_batches_that_are_only_remembered():
    head = make_head(class_prior="frequency")
    embedding, mask = embedded(head)
    head.update_mixture(embedding, mask, remember_only=True)
    labels = head.labels(mask, embedding)
    assert head.class_counts.tolist() == [int((labels == c).sum()) for c in range(3)]


def test_a_class_that_never_came_stays_as_it_is():
    """Although the authors' memory is full of random vectors from the start."""
    head = make_head(num_classes=4, memory_start="random")
    before = head.mixture.means[3].clone()
    head.update_mixture(*embedded(head, classes=3), remember_only=True)
    head.update_mixture(*embedded(head, classes=3))
    assert torch.equal(head.mixture.means[3], before)
    assert not head.mixture.fitted[3].any()


def test_a_run_does_not_count_the_batches_of_another():
    head = make_head(num_classes=4, mean_momentum=0.5)
    head.update_mixture(*embedded(head, classes=4))
    head.update_mixture(*embedded(head, classes=4), accumulating=True)
    before = head.mixture.means[3].clone()
    head.forget_batches()
    head.update_mixture(*embedded(head, classes=3))
    assert torch.equal(head.mixture.means[3], before)


def test_what_waits_is_in_the_state_of_the_memory():
    """So that a run that goes on is that which was never interrupted."""
    head = make_head(num_classes=4)
    head.update_mixture(*embedded(head, classes=1))
    head.update_mixture(*embedded(head, classes=4, count=9), remember_only=True)
    again = make_head(num_classes=4)
    again.load_state_dict(head.state_dict())
    again.load_memory_state(head.memory_state())
    batch = embedded(head, classes=1)
    for one in (head, again):
        one.update_mixture(*batch)
        assert one.mixture.fitted.any(1).all()
    assert_same_state(again.mixture.state_dict(), head.mixture.state_dict())


@pytest.mark.parametrize("start", ["empty", "random"])
def test_a_memory_goes_on_as_it_was(start):
    head, again = (make_head(memory="ring", memory_start=start) for _ in range(2))
    again.load_state_dict(head.state_dict())
    again.load_memory_state(head.memory_state())
    batch = embedded(head)
    for one in (head, again):
        one.update_mixture(*batch)
    assert_same_state(again.mixture.state_dict(), head.mixture.state_dict())


def test_batches_of_one_step_count_together():
    head = make_head(num_classes=4, mean_momentum=0.5)
    head.update_mixture(*embedded(head, classes=4))
    for accumulating in (True, False):
        before = head.mixture.means.clone()
        head.update_mixture(*embedded(head, classes=4), accumulating=accumulating)
        assert torch.equal(head.mixture.means, before) == accumulating
        moved = head.mixture.means.clone()
        head.update_mixture(*embedded(head, classes=3))
        alone = torch.equal(head.mixture.means[3], moved[3])
        assert alone != accumulating  # class 3 was in the other batch of this step, or in no batch


@pytest.mark.parametrize(
    "options", [{}, {"mean_momentum": 0.5}, {"mean_momentum": 0.0, "samples_per_component": 3}]
)
def test_em_equals_the_plain_loops(options):
    head = make_head(num_classes=4, **options)
    reference = PlainEM(head)
    for i in range(8):
        batch = embedded(head, classes=4 if i % 2 else 3)  # class 3 is not always there
        head.update_mixture(*batch, remember_only=i % 3 == 2)
        reference.step(*batch, remember_only=i % 3 == 2)
        for tensor, expected in (
            (head.mixture.means, reference.means),
            (head.mixture.variances, reference.variances),
        ):
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-4, atol=1e-5)
    counts = head.memory.moments().counts.view(4, 5)
    for (c, m), queue in reference.queues.items():
        assert counts[c, m] == len(queue)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"assignment": "em", "loops": 3},
        {"memory": "decay", "memory_filter": "correct", "label_reduction": "labelled"},
        {"covariance": "full", "component_loss_weight": 0.0},
    ],
    ids=str,
)
def test_the_assignment_of_the_loss_spares_the_e_step_and_changes_nothing(options):
    head = make_head(**options, embedding_dim=None, mean_momentum=0.5)
    other = copy.deepcopy(head)
    for i in range(3):
        features, mask = make_batch()
        features[0, 0, 5, 5] = torch.nan if i else 0.0
        losses = step(head, features, mask, remember_only=i == 1)
        other.update_mixture(losses["embedding"], mask, remember_only=i == 1)
        assert_same_state(copied(head), copied(other))
        assert_same_memory(head, other, rtol=0, atol=0)


def test_the_variance_may_have_a_momentum():
    slow, fast = make_head(variance_momentum=0.75), make_head()
    fast.load_state_dict(slow.state_dict())
    batch, start = embedded(slow), slow.mixture.variances.sqrt()
    for each in (slow, fast):
        each.update_mixture(*batch)
    expected = 0.75 * start + 0.25 * fast.mixture.variances.sqrt()
    torch.testing.assert_close(slow.mixture.variances.sqrt(), expected)


def test_parameters_stay_the_same_tensors():
    head = make_head(assignment="em", loops=2)
    places = {name: buffer.data_ptr() for name, buffer in head.named_buffers()}
    before = head.mixture.means.clone()
    step(head, *make_batch())
    assert not torch.equal(head.mixture.means, before)
    assert places == {name: buffer.data_ptr() for name, buffer in head.named_buffers()}


# --- switches --------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_filter", ["labelled", "correct"])
def test_which_pixels_enter(memory_filter):
    head = make_head(**BIG, memory_filter=memory_filter)
    features, mask = make_batch()
    losses = head.compute_loss(features, mask)
    labels = head.labels(mask, losses["embedding"])
    correct = rows(head.scores(losses["embedding"])[0]).argmax(1) == labels
    assert 0 < (correct & (labels < 255)).sum() < (labels < 255).sum()
    enter = correct if memory_filter == "correct" else labels < 255
    head.update_mixture(losses["embedding"], mask)
    assert counts_of(head).tolist() == [(enter & (labels == c)).sum() for c in range(3)]


@pytest.mark.parametrize("assignment", ["em", "sinkhorn"])
def test_plain_em_learns_the_weights_and_sinkhorn_does_not(assignment):
    head = make_head(assignment=assignment, mean_momentum=0.0)
    before = head.mixture.log_weights.clone()
    step(head, *make_batch())
    weights = head.mixture.log_weights.exp()
    torch.testing.assert_close(weights.sum(1), torch.ones(3))
    assert torch.equal(before, head.mixture.log_weights) == (assignment == "sinkhorn")
    assert (weights > 0).all()
    if assignment == "em":  # without momentum, the batch's shares
        counts = head.memory.moments().counts.view(3, 5)
        share = (counts / counts.sum(1, keepdim=True)).float()
        torch.testing.assert_close(weights, share, rtol=0, atol=1e-3)


@pytest.mark.parametrize("memory", ["ring", "decay"])
def test_more_loops_fit_better_and_remember_once(memory):
    batch = make_batch(size=16)
    once = make_head(**BIG, memory=memory, mean_momentum=0.0)
    often = make_head(**BIG, memory=memory, mean_momentum=0.0, loops=10)
    often.load_state_dict(once.state_dict())
    fits = []
    for head in (once, often):
        embedding = step(head.eval(), *batch)["embedding"]
        labels = head.labels(batch[1], embedding)
        valid = labels < 255
        own = head.component_log_density(embedding)[valid, labels[valid]]
        fits.append(own.logsumexp(1).mean())
        assert head.memory.moments().counts.sum() == valid.sum()
    assert fits[1] > fits[0] + 0.05


@pytest.mark.parametrize("memory", ["ring", "decay"])
def test_full_covariance(memory):
    head = make_head(covariance="full", memory=memory, memory_size=1000, components=1)
    features, mask = make_batch()
    embedding = step(head, features, mask)["embedding"]
    labels = head.labels(mask, embedding)
    for c in range(3):
        own = rows(embedding)[labels == c]
        mean = F.normalize(own.sum(0), dim=0)
        expected = (own - mean).T @ (own - mean) / len(own) + 1e-2 * torch.eye(4)
        torch.testing.assert_close(head.mixture.covariances[c, 0], expected)
    assert head(features).isfinite().all()


def test_without_a_projection():
    head = make_head(embedding_dim=None)
    assert not list(head.projection.parameters())
    assert head.mixture.dim == 6
    features, mask = make_batch()
    expected = F.normalize(F.layer_norm(features.movedim(1, -1), (6,)), dim=-1).movedim(-1, 1)
    torch.testing.assert_close(head.embed(features), expected)
    assert step(head, features, mask)["loss"].isfinite()


@pytest.mark.parametrize("kind", ["naive_bayes", "discriminant_analysis"])
def test_class_prior_and_shrinkage_are_those_of_scikit_learn(kind):
    """One Gaussian a class: naive Bayes as it is, linear discriminant analysis when pooled."""
    naive_bayes = pytest.importorskip("sklearn.naive_bayes")
    discriminant_analysis = pytest.importorskip("sklearn.discriminant_analysis")
    if kind == "naive_bayes":
        theirs, options, counts = naive_bayes.GaussianNB(), {}, (300, 60, 20)
    else:  # which weighs classes by their size, we do not
        theirs = discriminant_analysis.LinearDiscriminantAnalysis(solver="lsqr")
        options, counts = {"covariance": "full", "shrinkage": 1.0}, (100, 100, 100)
    labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
    x = torch.randn(len(labels), 4) * (labels[:, None] + 1.0) + labels[:, None]
    x[:, 1] += x[:, 0]
    head = make_head(
        in_channels=4, embedding_dim=None, normalize_features=False, components=1,
        variance_floor=1e-9, logit_norm="none", class_prior="frequency", mean_momentum=0.0,
        memory="decay", memory_size=10**7, samples_per_component=1000, **options,
    )  # fmt: skip
    embedding = x.T[None, :, None]
    head.update_mixture(embedding, labels[None, None])
    ours = rows(head.class_maps(embedding)[0]).log_softmax(1)
    expected = theirs.fit(x.double().numpy(), labels.numpy()).predict_log_proba(x.double().numpy())
    np.testing.assert_allclose(ours.numpy(), expected, atol=0.02 if kind == "naive_bayes" else 0.05)


def test_raw_features():
    head = make_head(embedding_dim=None, normalize_features=False, mean_momentum=0.0)
    features, mask = make_batch()
    torch.testing.assert_close(head.embed(features), features, rtol=0, atol=0)
    step(head, features + 100, mask)
    assert head.mixture.centres[:, 0].mean() > 90  # neither features nor means are normalised


@pytest.mark.parametrize(
    ("options", "size", "tolerance"),
    [
        ({"memory_dtype": "bfloat16"}, 40, 0.02),
        ({"memory_dtype": "float16"}, 40, 0.02),
        ({"memory": "decay"}, 10_000, 0.01),  # as long as little has been forgotten
    ],
)
def test_smaller_memories_give_nearly_the_same_mixture(options, size, tolerance):
    head, small = make_head(memory_size=size), make_head(memory_size=size, **options)
    small.load_state_dict(head.state_dict())
    for _ in range(3):
        batch = embedded(head)
        for each in (head, small):
            each.update_mixture(*batch)
    torch.testing.assert_close(small.mixture.means, head.mixture.means, rtol=0, atol=tolerance)
    if "memory" in options:
        assert sum(tensor.numel() for tensor in small.memory.moments()) == 3 * 5 * (1 + 4 + 4)
    else:
        assert small.memory.features.dtype == getattr(torch, options["memory_dtype"])


# --- hostile data ----------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("assignment", ["em", "sinkhorn"])
@pytest.mark.parametrize("memory", ["ring", "decay"])
def test_everything_ignored_changes_nothing(assignment, memory, first):
    head = make_head(assignment=assignment, memory=memory)
    features, mask = make_batch()
    if not first:
        step(head, features, mask)
    nothing = torch.full_like(mask, 255)
    losses = head.compute_loss(features.requires_grad_(), nothing)
    losses["loss"].backward()
    assert losses["loss"] == 0
    assert torch.equal(features.grad, torch.zeros_like(features))
    before, counts = copied(head), head.memory.moments().counts.clone()
    head.update_mixture(losses["embedding"], nothing)
    assert_same_state(copied(head), before)
    assert torch.equal(head.memory.moments().counts, counts)


def test_an_absent_class_is_untouched():
    head = make_head(assignment="em")
    step(head, *make_batch())
    before = copied(head.mixture)
    features, mask = make_batch()
    mask[mask == 1] = 255
    step(head, features, mask)
    for name, now in copied(head.mixture).items():
        assert torch.equal(now[1], before[name][1]), name
        assert not torch.equal(now[0], before[name][0]), name


def test_one_labelled_pixel():
    head = make_head(mean_momentum=0.0)
    features, mask = make_batch()
    before = head.mixture.means.clone()
    mask[:] = 255
    mask[1, 16:20, 16:20] = 2
    losses = step(head, features, mask)
    assert losses["loss"].isfinite()
    changed = (head.mixture.means != before).any(-1)
    assert changed.sum() == 1
    assert changed[2].any()
    torch.testing.assert_close(head.mixture.means[changed][0], losses["embedding"][1, :, 4, 4])
    torch.testing.assert_close(head.mixture.variances[changed], torch.full((1, 4), 1e-2))


def test_identical_pixels():
    head = make_head()
    features, mask = make_batch()
    features[:] = features[:1, :, :1, :1]
    for _ in range(3):
        losses = step(head.eval(), features, mask)
        losses["loss"].backward()
    assert losses["loss"].isfinite()
    assert (head.mixture.variances >= 1e-2 - 1e-6).all()
    assert head(features).isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "options",
    [{}, {"memory": "decay"}, {"assignment": "em", "loops": 2}, {"memory_filter": "correct"}],
)
def test_pixels_that_are_not_finite_count_as_ignored(value, options):
    head = make_head(**options)
    other = copy.deepcopy(head)
    broken, mask = embedded(head)
    whole, masked = broken.clone(), mask.clone()
    broken[0, :, 5, 5] = broken[1, 2, 3, 4] = value
    masked[0, 20:24, 20:24] = masked[1, 12:16, 16:20] = 255
    head.update_mixture(broken, mask)
    other.update_mixture(whole, masked)
    assert_same_state(copied(head.mixture), copied(other.mixture))
    assert_same_memory(head, other, rtol=0, atol=0)
    assert all(buffer.isfinite().all() for buffer in head.mixture.buffers())


def test_one_nan_image_leaves_the_mixture_alone():
    head = make_head()
    step(head, *make_batch())
    features, mask = make_batch()
    features[0, 0, 0, 0] = torch.nan  # the BatchNorm spreads it over the whole batch
    before = copied(head.mixture)
    losses = step(head, features, mask)
    assert losses["loss"].isnan()  # and is seen: training shall stop here, not go on with zeros
    assert_same_state(copied(head.mixture), before)


@pytest.mark.parametrize("dim", [1, 512])
def test_a_class_of_one_dimension_and_of_512(dim):
    head = make_head(embedding_dim=dim, normalize_features=dim > 1)
    losses = step(head, *make_batch())
    losses["loss"].backward()
    assert losses["loss"].isfinite()
    assert all(buffer.isfinite().all() for buffer in head.mixture.buffers())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"covariance": "full", "embedding_dim": 65}, "set embedding_dim to 64 or less"),
        ({"covariance": "full", "embedding_dim": None, "in_channels": 256}, "embedding has 256"),
        ({"mean_momentum": 1.5}, "mean_momentum is 1.5; it must be between 0 and 1"),
        ({"variance_momentum": 1.5}, "variance_momentum is 1.5; it must be between 0 and 1"),
        ({"variance_floor": 0.0}, "variance_floor is 0.0; it must be at least"),
        ({"num_classes": 0}, "num_classes is 0; it must be at least 1"),
        ({"memory": "decay", "memory_dtype": "float16"}, "memory_dtype needs em.memory ring"),
        ({"train": "gradient", "class_prior": "frequency"}, r"mixture\.class_prior belong to EM"),
        ({"train": "gradient", "shrinkage": 0.5}, r"mixture\.shrinkage and .* belong to EM"),
        ({"shrinkage": 1.5}, "shrinkage"),
        *(
            ({name: 0}, f"{name} is 0; it must be at least 1")
            for name in ("components", "loops", "interval", "samples_per_component", "memory_size")
        ),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(GenSegError, match=message):
        make_head(**options)


# --- cost ------------------------------------------------------------------------------------


def count_operations(head, features, mask):
    with Operations() as seen:
        losses = step(head, features.requires_grad_(), mask)
        losses["loss"].backward()
        head.update_mixture(losses["embedding"], mask)
    return seen


@pytest.mark.parametrize("options", [{}, {"assignment": "em"}, {"memory": "decay"}])
def test_no_tensor_of_pixels_by_components_by_dimensions(options):
    head = make_head(num_classes=40, components=5, embedding_dim=32, memory_size=5, **options)
    seen = count_operations(head, *make_batch(classes=40, size=16, stride=1))
    assert seen.largest == 2 * 16 * 16 * 40 * 5


# With D = 4: few classes take the E-step from the matrix product, many from their own components
# only.
@pytest.mark.parametrize("sizes", [((2, 2), (4, 7)), ((5, 2), (20, 7))], ids=["few", "many"])
@pytest.mark.parametrize(
    "options", [{}, {"assignment": "em", "memory_filter": "correct"}, {"memory": "decay"}]
)
def test_as_many_operations_whatever_the_number_of_classes(options, sizes):
    counts = []
    for classes, components in sizes:
        head = make_head(num_classes=classes, components=components, **options)
        seen = count_operations(head, *make_batch(classes=classes))
        assert "aten::_local_scalar_dense" not in seen.names  # no `.item()`
        counts.append(len(seen.names))
    assert counts[0] == counts[1]


@pytest.mark.skipif(
    torch.__version__ < "2.10", reason="before 2.10 fake CUDA tensors need a driver"
)
@pytest.mark.parametrize(
    "options",
    [
        {"label_reduction": "labelled"},
        {"memory": "decay", "assignment": "em", "memory_filter": "correct"},
    ],
)
def test_a_training_step_never_waits_for_the_gpu(options):
    # Fake tensors run no kernel, so that "cuda" is there without a GPU; what would have to know a
    # value (`.item()`, `nonzero`, boolean indexing) raises.
    with FakeTensorMode():
        with torch.device("cuda"):
            head = make_head(**options)
        head.memory.to(torch.device("cuda"))
        features = torch.randn(2, 6, 8, 8, device="cuda")
        mask = torch.zeros(2, 32, 32, dtype=torch.long, device="cuda")
        with pytest.raises(DataDependentOutputException):
            mask.sum().item()
        losses = step(head, features, mask)
        head.update_mixture(losses["embedding"], mask)
        assert losses["loss"].device.type == head.mixture.means.device.type == "cuda"


def test_a_compiled_loss_has_no_graph_break():
    head, (features, mask) = make_head(), make_batch()
    head.eval()  # dropout draws otherwise
    whole = torch.compile(head.compute_loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(features, mask), head.compute_loss(features, mask))


# --- several processes -----------------------------------------------------------------------


def distributed_batches():
    """Two steps; in the second, a class is in one process only and the other's image is ignored."""
    for i in range(2):
        features, mask = make_batch(count=4)
        if i:
            mask[:2][mask[:2] == 1] = 255
            mask[2:][mask[2:] != 1] = 255
            mask[3] = 255
        yield features, mask


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"memory": "decay"},
        {"assignment": "em", "loops": 3},
        {"memory_filter": "correct", "samples_per_component": 4},
        {"covariance": "full", "memory_size": 5},
        {"shrinkage": 0.5, "class_prior": "frequency"},
    ],
)
def test_two_processes_equal_one(options):
    alone = make_head(**options, embedding_dim=None)  # no batch statistics, which would differ
    start, batches = copy.deepcopy(alone), list(distributed_batches())
    for features, mask in batches:
        step(alone, features, mask)

    def work(processes):
        head = copy.deepcopy(start)
        for features, mask in batches:
            mine = slice(2 * processes.rank, 2 * processes.rank + 2)
            step(head, features[mine], mask[mine], processes=processes)
        return head

    first, second = run_processes(work, 2)
    assert_same_state(copied(first.mixture), copied(second.mixture))
    for name, value in alone.mixture.state_dict().items():
        torch.testing.assert_close(first.mixture.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    for head in (first, second):
        assert_same_memory(head, alone)
        assert (head.class_counts is None) == ("class_prior" not in options)
        if head.class_counts is not None:
            assert torch.equal(head.class_counts, alone.class_counts)


@pytest.mark.parametrize("assignment", ["sinkhorn", "em"])
def test_decayed_moments_send_statistics_only(assignment):
    """C M (2 D + 1) numbers and a few for each component, however many pixels there are."""

    def sent(count):
        numbers = []

        def gather(tensor):
            numbers.append(tensor.numel())
            return torch.stack([tensor, tensor])

        head = make_head(memory="decay", assignment=assignment, components=2)
        step(head, *make_batch(count=count), processes=Processes(gather, 0))
        return numbers

    few, groups = sent(2), 3 * 2
    assert few == sent(6)
    moments = groups * (2 * 4 + 1)
    assert moments < sum(few) <= moments + 12 * (groups + 2)


# --- it learns -------------------------------------------------------------------------------


def xor_batch(size=16):
    """Two classes of two groups each, at the corners of a square: the same mean and variance."""
    mask = torch.randint(2, (2, size, size))
    first = torch.randint(2, (2, size, size)) * 2 - 1.0
    second = torch.where(mask == 0, first, -first)
    return 2 * torch.stack([first, second], 1) + 0.3 * torch.randn(2, 2, size, size), mask


def trained_on_xor(**options):
    head = make_head(**RAW, mean_momentum=0.9, **options)
    for _ in range(30):
        features, mask = xor_batch()
        head.update_mixture(head.embed(features), mask)
    return head


@pytest.mark.parametrize("assignment", ["em", "sinkhorn"])
@pytest.mark.parametrize("memory", ["ring", "decay"])
def test_several_components_learn_what_one_cannot(assignment, memory):
    def accuracy(components):
        options = {"memory": memory, "assignment": assignment, "memory_size": 200}
        head = trained_on_xor(components=components, **options)
        features, mask = xor_batch(32)
        return (head(features).argmax(1) == mask).float().mean().item()

    assert accuracy(1) < 0.6
    assert accuracy(2) > 0.99
    assert accuracy(4) > 0.98


def test_strange_features_score_higher_than_seen_ones():
    head = trained_on_xor(components=2)
    seen = head.scores(head.embed(xor_batch()[0]))[1]
    between = head.scores(torch.zeros(1, 2, 4, 4))[1]  # where no class has a component
    far = head.scores(torch.full((1, 2, 4, 4), 20.0))[1]
    assert between.min() > seen.quantile(0.99)
    assert far.min() > between.max()
    # A posterior would not see it: the far corner belongs to class 0 for certain.
    assert head.mixture.log_density(torch.full((1, 2), 20.0)).softmax(1).max() > 0.99


@pytest.mark.parametrize("train", ["em", "gradient"])
def test_head_and_projection_learn_together(train):
    options = {"embedding_dim": 16, "components": 2, "mean_momentum": 0.9, "logit_scale": 3.0}
    head = make_head(num_classes=6, train=train, **options)
    optimizer = torch.optim.AdamW(head.parameters(), 0.02)
    losses = []
    for _ in range(60):
        features, mask = make_batch(classes=6)
        out = head.compute_loss(features, mask)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        if train == "em":
            head.update_mixture(out["embedding"], mask, out["assignment"])
        losses.append(out["loss_ce"].item())
    features, mask = make_batch(classes=6)
    labels = mask[:, 2::4, 2::4]
    correct = (head.eval()(features).argmax(1) == labels)[labels < 255].float().mean()
    assert correct > 0.85  # chance: 0.17
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


# --- labels of cells -------------------------------------------------------------------------


def test_labels_are_read_in_the_middle_of_a_cell():
    mask = torch.zeros(1, 8, 8, dtype=torch.long)
    mask[:, 2::4, 2::4] = 1
    labels = make_head().labels(mask, torch.zeros(1, 4, 2, 2))
    assert labels.tolist() == [1, 1, 1, 1]


def test_points_between_the_middles_of_cells_count_if_told_so():
    mask = torch.full((2, 24, 20), 255)
    mask[0, 0, 0], mask[0, 7, 19], mask[1, 23, 8] = 1, 0, 2  # cells of 4 pixels: none is a middle
    mask[1, 4:7, 4], mask[1, 4:6, 5] = 0, 2  # three against two in one cell
    embedding = torch.randn(2, 4, 6, 5)
    small = make_head(label_reduction="labelled").labels(mask, embedding).view(2, 6, 5)
    expected = torch.full((2, 6, 5), 255)
    expected[0, 0, 0], expected[0, 1, 4], expected[1, 5, 2], expected[1, 1, 1] = 1, 0, 2, 0
    assert torch.equal(small, expected)
    assert (make_head().labels(mask, embedding) == 255).sum() >= 59
