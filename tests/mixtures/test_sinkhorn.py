"""Sinkhorn against the plain-space loop over classes that the authors published."""

import pytest
import torch

from lightning_genseg.errors import GenSegError
from lightning_genseg.mixtures import sinkhorn
from tests.mixtures.processes import run_processes

close = torch.testing.assert_close


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


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("epsilon", [0.05, 0.3, 2.0])
@pytest.mark.parametrize("iterations", [1, 3, 20])
def test_equals_the_plain_loop(epsilon, iterations, dtype, rescale):
    log_density, labels = scene(dtype=dtype)
    log_density = log_density if rescale else log_density / 20
    expected = plain(log_density.double(), labels, epsilon, iterations, rescale)
    q = sinkhorn(log_density, labels, 4, epsilon, iterations, rescale).exp()
    valid = labels < 255
    assert q.dtype == dtype
    assert expected[valid].isfinite().all()
    bound = 1e-5 if dtype == torch.float64 else 1e-4
    close(q[valid].double(), expected[valid], rtol=0, atol=bound)


def test_negative_densities_are_rescaled_by_the_largest_in_absolute_value():
    log_density, labels = scene()
    log_density, valid = -log_density.abs(), labels < 255
    expected = plain(log_density, labels)
    close(sinkhorn(log_density, labels, 4).exp()[valid], expected[valid], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rescale", [True, False])
def test_a_tiny_epsilon_does_not_overflow(rescale):
    log_density, labels = scene(dtype=torch.float32)
    assert not plain(log_density, labels, 1e-4, rescale=rescale)[labels < 255].isfinite().all()
    q = sinkhorn(log_density, labels, 4, 1e-4, rescale=rescale).exp()
    assert q[labels < 255].isfinite().all()
    close(q[labels < 255].sum(1), torch.ones(int((labels < 255).sum())))


def test_marginals():
    log_density, labels = scene()
    q = sinkhorn(log_density, labels, 4, epsilon=0.5, iterations=200).exp()
    for c in range(4):
        own = q[labels == c]
        close(own.sum(1), torch.ones_like(own[:, 0]))
        close(own.mean(0), torch.full((5,), 0.2, dtype=torch.float64))


def test_solves_the_entropic_problem():
    # The optimum of sum q log p + eps H(q) under the marginals has the form u_n p^(1/eps) v_m,
    # so all 2 x 2 cross ratios of q equal those of p^(1/eps).
    log_density, labels = torch.randn(6, 3, dtype=torch.float64), torch.zeros(6, dtype=torch.long)
    log_q = sinkhorn(log_density, labels, 1, epsilon=0.7, iterations=5, rescale=False)

    def cross(table):
        return table[1:, 1:] - table[1:, :1] - table[:1, 1:] + table[:1, :1]

    close(cross(log_q), cross(log_density / 0.7))


def test_classes_do_not_see_each_other():
    log_density, labels = scene()
    together = sinkhorn(log_density, labels, 4)
    for c in range(4):
        own = labels == c
        alone = sinkhorn(log_density[own], torch.zeros(int(own.sum()), dtype=torch.long), 1)
        close(together[own], alone)


@pytest.mark.parametrize("ignore", [255, -100, 4])
def test_pixels_of_any_label_outside_change_nothing_even_if_nan(ignore):
    log_density, labels = scene()
    valid = labels < 255
    alone = sinkhorn(log_density[valid], labels[valid], 4)
    log_density[~valid] = torch.nan
    labels = labels.masked_fill(~valid, ignore)
    close(sinkhorn(log_density, labels, 4)[valid], alone)


def test_one_pixel_identical_pixels_and_all_ignored():
    for rows in (torch.tensor([[1.0, 2.0, 3.0]]), torch.full((10, 3), -5.0), torch.zeros(10, 3)):
        q = sinkhorn(rows, torch.ones(len(rows), dtype=torch.long), 4).exp()
        close(q, torch.full((len(rows), 3), 1 / 3))
    ignored = sinkhorn(torch.randn(10, 3), torch.full((10,), 255), 4)
    assert ignored.shape == (10, 3)
    assert sinkhorn(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), 4).shape == (0, 3)


def test_no_iterations_is_a_softmax():
    log_density, labels = scene()
    q = sinkhorn(log_density, labels, 4, epsilon=2.0, iterations=0, rescale=False)
    close(q, (log_density / 2).log_softmax(1))


def test_two_processes_assign_as_one():
    log_density, labels = scene()
    whole = sinkhorn(log_density, labels, 4)
    parts = list(zip(log_density.tensor_split(2), labels.tensor_split(2), strict=True))
    halves = run_processes(lambda p: sinkhorn(*parts[p.rank], 4, processes=p), 2)
    close(torch.cat(halves), whole)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("nan")])
def test_refuses_an_epsilon_that_is_not_positive(epsilon):
    with pytest.raises(GenSegError, match="epsilon is"):
        sinkhorn(torch.zeros(1, 1), torch.zeros(1, dtype=torch.long), 1, epsilon)
