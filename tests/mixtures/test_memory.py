"""Memories against deques, closed forms and one process."""

from collections import deque

import pytest
import torch

from lightning_genseg.errors import GenSegError
from lightning_genseg.mixtures import DecayedMoments, FeatureRing, spread_evenly
from lightning_genseg.mixtures.memory import (
    batch_moments,
    count_groups,
    gather_features,
    ranks_in_group,
)
from tests.mixtures.processes import run_processes

FULL = pytest.mark.parametrize("full", [False, True], ids=["diagonal", "full"])
close = torch.testing.assert_close


def batch(count: int, groups: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Features, and their groups; the last is nobody's."""
    return torch.randn(count, 3), torch.randint(groups, (count,))


def check_moments(moments, contents, tolerance=1e-9):
    """Compare running moments with those of lists of features, one list a group."""
    for g, own in enumerate(contents):
        x = torch.stack(list(own)).double() if len(own) else moments.first.new_zeros(0, 3)
        second = x.T @ x if moments.second.ndim == 3 else x.square().sum(0)
        close(moments.counts[g].item(), float(len(own)))
        close(moments.first[g], x.sum(0), rtol=tolerance, atol=tolerance)
        close(moments.second[g], second, rtol=tolerance, atol=tolerance)


def contents_of(ring):
    stored = ring.features[:-1].view(ring.groups, ring.size, ring.dim)
    filled = ring.entered[: ring.groups].clamp_max(ring.size)
    return [stored[g, : filled[g]] for g in range(ring.groups)]


@FULL
def test_ring_equals_a_deque_per_group(full):
    ring = FeatureRing(4, 3, size=7, full=full)
    queues = [deque(maxlen=7) for _ in range(4)]
    for step in range(60):
        # From nothing to three times what the ring holds; group 3 never, group 4 is nobody's.
        x, groups = batch(int(torch.randint(0, 30, ())), 5)
        groups[groups == 3] = 2 if step % 2 else 4
        ring.push(x, groups)
        for row, group in zip(x, groups.tolist(), strict=True):
            if group < 4:
                queues[group].append(row)
        check_moments(ring.moments(), queues)
        for stored, queue in zip(contents_of(ring), queues, strict=True):
            assert sorted(stored.tolist()) == sorted(row.tolist() for row in queue)
    assert ring.entered[3] == ring.moments().counts[3] == 0


@pytest.mark.parametrize(("size", "expected"), [(1, [9]), (3, [7, 8, 9])])
def test_ring_drops_the_oldest_first(size, expected):
    ring = FeatureRing(1, 1, size)
    for value in range(5):
        ring.push(torch.tensor([[float(value)]]), torch.tensor([0]))
    assert sorted(contents_of(ring)[0].flatten().tolist()) == [2, 3, 4][-size:]
    # Of more newcomers than slots, the last stay.
    ring.push(torch.arange(10.0)[:, None], torch.zeros(10, dtype=torch.long))
    assert sorted(contents_of(ring)[0].flatten().tolist()) == expected
    assert ring.moments().first.item() == sum(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ring_in_half_precision_has_the_moments_of_what_it_stores(dtype):
    ring = FeatureRing(2, 3, size=20, dtype=dtype)
    for _ in range(30):
        ring.push(*batch(9, 2))
    assert ring.features.dtype == dtype
    check_moments(ring.moments(), contents_of(ring))


def test_ring_neither_drifts_nor_grows_in_ten_thousand_updates():
    ring = FeatureRing(6, 3, size=50)

    def places():
        return [(t.shape, t.data_ptr()) for t in (ring.features, ring.entered, *ring._moments)]

    before = places()
    for _ in range(10_000):
        ring.push(*batch(8, 7))
    assert (ring.entered[:6] > 50 * 100).all()
    check_moments(ring.moments(), contents_of(ring), tolerance=1e-9)
    assert places() == before


@FULL
def test_decay_follows_its_closed_form(full):
    memory = DecayedMoments(3, 3, size=10, full=full)
    batches = [batch(n) for n in (5, 0, 12, 30, 1)]
    for x, groups in batches:
        memory.push(x, groups)
    # A feature of batch b weighs 0.9 ** (own group's features in later batches).
    for g in range(3):
        later, count, first, second = 0, 0.0, torch.zeros(3).double(), torch.zeros(3, 3).double()
        for x, groups in reversed(batches):
            own, weight = x[groups == g].double(), 0.9**later
            count += weight * len(own)
            first += weight * own.sum(0)
            second += weight * own.T @ own
            later += len(own)
        moments = memory.moments()
        close(moments.counts[g].item(), count)
        close(moments.first[g], first)
        close(moments.second[g], second if full else second.diagonal())


def test_decay_settles_at_its_effective_length():
    memory = DecayedMoments(2, 1, size=100)
    for step in range(2000):
        memory.push(torch.full((2, 1), float(step)), torch.zeros(2, dtype=torch.long))
    counts, first, _ = memory.moments()
    assert counts[0].item() == pytest.approx(100, rel=0.02)
    assert (first[0] / counts[0]).item() == pytest.approx(2000 - 50, rel=0.01)  # mean age: size
    assert counts[1] == 0


@pytest.mark.parametrize("kind", [FeatureRing, DecayedMoments])
@FULL
def test_a_loaded_memory_goes_on_as_the_same(kind, full):
    steps = [batch(9) for _ in range(12)]
    straight, first, second = (kind(3, 3, 8, full) for _ in range(3))
    for step in steps:
        straight.push(*step)
    for step in steps[:6]:
        first.push(*step)
    state = first.state_dict()
    first.push(*batch(9))  # must not reach into the saved state
    second.load_state_dict(state)
    for step in steps[6:]:
        second.push(*step)
    for mine, theirs in zip(second.moments(), straight.moments(), strict=True):
        close(mine, theirs)


def test_a_ring_saves_only_its_filled_part():
    ring, larger = FeatureRing(3, 3, size=1000), FeatureRing(3, 3, size=2000)
    ring.push(torch.randn(10, 3), torch.zeros(10, dtype=torch.long))
    state = ring.state_dict()
    assert state["features"].shape == (3, 10, 3)
    larger.load_state_dict(state)  # not having gone round, it may go on in a larger one
    close(larger.moments().first, ring.moments().first)


@pytest.mark.parametrize(
    ("memory", "kind", "words"),
    [
        (FeatureRing(3, 3, 3), FeatureRing, "set memory_size as in the checkpoint"),
        (FeatureRing(3, 3, 5), FeatureRing, "set memory_size as in the checkpoint"),  # gone round
        (FeatureRing(4, 3, 4), FeatureRing, "set components, embedding_dim and covariance as in"),
        (FeatureRing(3, 3, 4, True), FeatureRing, "set components, embedding_dim and covariance"),
        (DecayedMoments(3, 4, 4), DecayedMoments, "set components, embedding_dim and covariance"),
        (DecayedMoments(3, 3, 4), FeatureRing, "memory is a ring; set em.memory to ring"),
        (FeatureRing(3, 3, 4), DecayedMoments, "memory is no ring; set em.memory to decay"),
        (FeatureRing(3, 3, 4, dtype=torch.bfloat16), FeatureRing, "set em.memory_dtype to float32"),
    ],
)
def test_memories_refuse_the_state_of_another_shape(memory, kind, words):
    other = kind(3, 3, size=4)
    other.push(torch.randn(9, 3), torch.zeros(9, dtype=torch.long))
    with pytest.raises(GenSegError, match=words):
        memory.load_state_dict(other.state_dict())


@pytest.mark.parametrize("kind", [FeatureRing, DecayedMoments])
def test_memories_hold_at_least_one_feature(kind):
    with pytest.raises(GenSegError, match="size is 0; it must be at least 1"):
        kind(3, 2, 0)


@pytest.mark.parametrize("kind", [FeatureRing, DecayedMoments])
def test_what_is_not_finite_never_enters(kind):
    memory, groups = kind(2, 2, 8), torch.tensor([0, 0, 1])
    memory.push(torch.tensor([[1.0, 2], [3, torch.nan], [torch.inf, 0]]), groups)
    assert memory.moments().counts.tolist() == [1, 0]
    assert memory.moments().first.tolist() == [[1, 2], [0, 0]]


def test_what_overflows_a_ring_in_half_precision_never_enters():
    ring = FeatureRing(1, 1, 8, dtype=torch.float16)
    ring.push(torch.tensor([[1.0], [1e6]]), torch.zeros(2, dtype=torch.long))
    assert ring.moments().counts.tolist() == [1]


def test_no_variance_is_negative_by_rounding():
    x = torch.rand(100, dtype=torch.float64).repeat(7, 1)  # seven times the same
    memory = DecayedMoments(1, 100, 10)
    memory.push(x, torch.zeros(7, dtype=torch.long))
    assert (memory.moments().estimate().covariances >= 0).all()


# --- groups, samples, processes --------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "counts", "ranks"),
    [([2, 0, 2, 2, 1, 0], [2, 1, 3, 0], [0, 0, 1, 2, 0, 1]), ([], [0, 0, 0, 0], [])],
)
def test_counts_and_ranks(groups, counts, ranks):
    groups = torch.tensor(groups, dtype=torch.long)
    assert count_groups(groups, 4).tolist() == counts
    assert ranks_in_group(groups, 4).tolist() == ranks


@pytest.mark.parametrize("most", [1, 3, 7, 100])
def test_samples_are_spread_evenly(most):
    sizes = [0, 1, 3, 7, 8, 50, 1000]
    groups = torch.cat([torch.full((n,), g) for g, n in enumerate(sizes)])
    groups = groups[torch.randperm(len(groups))]
    chosen = spread_evenly(groups, 6, most)
    assert not chosen[groups == 6].any()  # nobody's
    for g, size in enumerate(sizes[:6]):
        places = chosen[groups == g].nonzero().flatten()
        assert len(places) == min(size, most)
        if size > most:
            gaps, share = places.diff(), -(-size // most)
            assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1
            assert places[0] < share  # and from one end to the other
            assert places[-1] >= size - share


@pytest.mark.parametrize("count", [2, 3])
def test_processes_choose_together_what_one_would(count):
    groups = torch.randint(6, (200,))
    groups[100:] = groups[100:].clamp_min(1)  # group 0 is in the first process only
    parts = groups.tensor_split(count)
    chosen = run_processes(lambda p: spread_evenly(parts[p.rank], 5, 9, p), count)
    assert torch.equal(torch.cat(chosen), spread_evenly(groups, 5, 9))


def test_processes_gather_their_features_in_order():
    x, groups = batch(30)
    groups[:10] = 3  # nobody's: the first process sends nothing
    parts = list(zip(x.split(10), groups.split(10), strict=True))
    features, index = gather_features(x, groups, 3)
    for theirs, their_index in run_processes(lambda p: gather_features(*parts[p.rank], 3, p), 3):
        kept = their_index < 3
        close(theirs[kept], features, rtol=0, atol=0)
        close(their_index[kept], index)
        assert len(theirs) <= 30  # padding up to the longest part: not whole feature maps


@FULL
def test_moments_of_processes_add_up(full):
    x, groups = batch(30)
    whole = batch_moments(x, groups, 3, full)
    check_moments(whole, [x[groups == g] for g in range(3)])
    parts = list(zip(x.split(15), groups.split(15), strict=True))
    for part in run_processes(lambda p: batch_moments(*parts[p.rank], 3, full, p), 2):
        for mine, theirs in zip(part, whole, strict=True):
            close(mine, theirs)
