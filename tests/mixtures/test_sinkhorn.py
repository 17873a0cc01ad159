"""Sinkhorn against the plain-space loop over classes that the authors published."""

import pytest
import torch

from lightning_genseg.mixtures import sinkhorn
from tests.mixtures.processes import run_processes


def plain(log_density, labels, epsilon=0.05, iterations=3, rescale=True):
    """The published algorithm: class by class, exponentials as they are."""
    q = torch.full_like(log_density, torch.nan)
    for c in labels[labels < 255].unique():
        own = log_density[labels == c]
        if rescale:
            own = own / own.abs().max()
        table = (own / epsilon).exp()
        table = table / table.sum()
        pixels, components = table.shape
        for _ in range(iterations):
            table = table / table.sum(0, keepdim=True) / components
            table = table / table.sum(1, keepdim=True) / pixels
        q[labels == c] = table * pixels
    return q


def scene(pixels=300, components=5, classes=4, dtype=torch.float64):
    labels = torch.randint(classes, (pixels,))
    labels[::17] = 255
    return torch.randn(pixels, components, dtype=dtype) * 20 + 30, labels


@pytest.mark.parametrize("epsilon", [0.05, 0.3, 2.0])
@pytest.mark.parametrize("iterations", [1, 3, 20])
def test_equals_the_plain_loop(epsilon, iterations):
    log_density, labels = scene()
    expected = plain(log_density, labels, epsilon, iterations)
    q = sinkhorn(log_density, labels, 4, epsilon, iterations).exp()
    valid = labels < 255
    assert expected[valid].isfinite().all()
    torch.testing.assert_close(q[valid], expected[valid], rtol=0, atol=1e-5)


def test_equals_the_plain_loop_in_float32():
    log_density, labels = scene(dtype=torch.float32)
    expected = plain(log_density.double(), labels)
    q = sinkhorn(log_density, labels, 4).exp()
    valid = labels < 255
    assert q.dtype == torch.float32
    torch.testing.assert_close(q[valid].double(), expected[valid], rtol=0, atol=1e-4)


def test_equals_the_plain_loop_without_rescaling():
    log_density, labels = scene()
    log_density = log_density / 20
    expected = plain(log_density, labels, rescale=False)
    q = sinkhorn(log_density, labels, 4, rescale=False).exp()
    valid = labels < 255
    torch.testing.assert_close(q[valid], expected[valid], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rescale", [True, False])
def test_a_tiny_epsilon_does_not_overflow(rescale):
    log_density, labels = scene(dtype=torch.float32)
    assert not plain(log_density, labels, 1e-4, rescale=rescale)[labels < 255].isfinite().all()
    q = sinkhorn(log_density, labels, 4, 1e-4, rescale=rescale).exp()
    assert q[labels < 255].isfinite().all()
    torch.testing.assert_close(q[labels < 255].sum(1), torch.ones(int((labels < 255).sum())))


def test_marginals():
    log_density, labels = scene()
    q = sinkhorn(log_density, labels, 4, epsilon=0.5, iterations=200).exp()
    for c in range(4):
        own = q[labels == c]
        torch.testing.assert_close(own.sum(1), torch.ones_like(own[:, 0]))
        torch.testing.assert_close(own.mean(0), torch.full((5,), 0.2, dtype=torch.float64))


def test_solves_the_entropic_problem():
    # The optimum of sum q log p + eps H(q) under the marginals has the form u_n p^(1/eps) v_m,
    # so all 2 x 2 cross ratios of q equal those of p^(1/eps).
    log_density, labels = torch.randn(6, 3, dtype=torch.float64), torch.zeros(6, dtype=torch.long)
    log_q = sinkhorn(log_density, labels, 1, epsilon=0.7, iterations=5, rescale=False)

    def cross(table):
        return table[1:, 1:] - table[1:, :1] - table[:1, 1:] + table[:1, :1]

    torch.testing.assert_close(cross(log_q), cross(log_density / 0.7))


def test_classes_do_not_see_each_other():
    log_density, labels = scene()
    together = sinkhorn(log_density, labels, 4)
    for c in range(4):
        own = labels == c
        alone = sinkhorn(log_density[own], torch.zeros(int(own.sum()), dtype=torch.long), 1)
        torch.testing.assert_close(together[own], alone)


def test_ignored_pixels_change_nothing_even_if_nan():
    log_density, labels = scene()
    valid = labels < 255
    alone = sinkhorn(log_density[valid], labels[valid], 4)
    log_density[~valid] = torch.nan
    torch.testing.assert_close(sinkhorn(log_density, labels, 4)[valid], alone)


@pytest.mark.parametrize("ignore", [255, -100, 4])
def test_any_label_outside_is_ignored(ignore):
    log_density, labels = scene()
    other = labels.masked_fill(labels == 255, ignore)
    valid = labels < 255
    expected = sinkhorn(log_density, labels, 4)[valid]
    torch.testing.assert_close(sinkhorn(log_density, other, 4)[valid], expected)


def test_one_pixel_identical_pixels_and_all_ignored():
    one = sinkhorn(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([1]), 4).exp()
    torch.testing.assert_close(one, torch.full((1, 3), 1 / 3))
    same = sinkhorn(torch.full((10, 3), -5.0), torch.zeros(10, dtype=torch.long), 1).exp()
    torch.testing.assert_close(same, torch.full((10, 3), 1 / 3))
    zeros = sinkhorn(torch.zeros(10, 3), torch.zeros(10, dtype=torch.long), 1).exp()
    torch.testing.assert_close(zeros, torch.full((10, 3), 1 / 3))
    ignored = sinkhorn(torch.randn(10, 3), torch.full((10,), 255), 4)
    assert ignored.shape == (10, 3)
    assert sinkhorn(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), 4).shape == (0, 3)


def test_no_iterations_is_a_softmax():
    log_density, labels = scene()
    q = sinkhorn(log_density, labels, 4, epsilon=2.0, iterations=0, rescale=False)
    torch.testing.assert_close(q, (log_density / 2).log_softmax(1))


def test_two_processes_assign_as_one():
    log_density, labels = scene()
    whole = sinkhorn(log_density, labels, 4)
    halves = run_processes(
        lambda processes: sinkhorn(
            log_density.tensor_split(2)[processes.rank],
            labels.tensor_split(2)[processes.rank],
            4,
            processes=processes,
        ),
        2,
    )
    torch.testing.assert_close(torch.cat(halves), whole)


@pytest.mark.parametrize("epsilon", [0.0, -1.0])
def test_refuses_an_epsilon_that_is_not_positive(epsilon):
    with pytest.raises(ValueError, match="it must be positive"):
        sinkhorn(torch.zeros(1, 1), torch.zeros(1, dtype=torch.long), 1, epsilon)
