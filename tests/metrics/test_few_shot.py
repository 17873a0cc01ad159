"""Scores of episodes: by hand, against scikit-learn, in pieces, and of nothing."""

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score

from lightning_genseg.metrics import FewShotMeanIoU, ForegroundBackgroundIoU, few_shot_metrics
from lightning_genseg.metrics.few_shot import EpisodeCounts


def test_three_episodes_by_hand():
    """Two of class 3, one of class 7, none of class 9; an ignored pixel that would be an error."""
    metrics = few_shot_metrics()
    everyone = torch.tensor([3, 7, 9])
    episodes = [
        ([[1, 1], [0, 0]], [[1, 0], [0, 255]], 3),  # foreground 1 of 2, background 1 of 2
        ([[1, 1], [1, 1]], [[1, 1], [0, 0]], 3),  # foreground 2 of 4, background 0 of 2
        ([[1, 0], [0, 0]], [[1, 0], [0, 0]], 7),  # foreground 1 of 1, background 3 of 3
    ]
    for prediction, target, category in episodes:
        metrics.update(torch.tensor(prediction), torch.tensor(target), category, everyone)
    scores = metrics.compute()
    assert scores["mIoU"] == pytest.approx((3 / 6 + 1 + 0) / 3)  # class 9 counts 0
    assert scores["FB_IoU"] == pytest.approx((4 / 7 + 4 / 7) / 2)
    assert scores["IoU"][[3, 7, 9]].tolist() == pytest.approx([0.5, 1, 0])
    assert scores["IoU"].isnan().sum() == 252


def test_the_authors_counts(golden_of):
    """BAM's own, see tests/golden/make.py; class 4 never comes, one episode has no object."""
    golden = {n.partition("/")[2]: v for n, v in golden_of("bam").items() if "counters/" in n}
    episodes = (golden["prediction"], golden["target"].long(), golden["class_of_episode"].long())
    for number, (prediction, target, category) in enumerate(zip(*episodes, strict=True)):
        one = EpisodeCounts()
        one.update(prediction, target, category)
        for name in ("intersection", "union"):
            expected = golden[f"{name}_of_each_episode"][number]
            assert torch.equal(getattr(one, name).sum(0).float(), expected)
    if "miou" in golden:
        metrics = few_shot_metrics()
        metrics.update(*episodes, torch.arange(5))
        for name in ("intersection", "union"):
            counts = getattr(metrics["IoU"], name)[:5, 1]
            assert torch.equal(counts.float(), golden[f"{name}_of_each_class"])
        scores = metrics.compute()
        assert scores["mIoU"] == pytest.approx(float(golden["miou"]), abs=1e-7)
        assert scores["FB_IoU"] == pytest.approx(float(golden["fb_iou"]), abs=1e-7)


def test_without_candidates_only_seen_classes_count():
    metric = FewShotMeanIoU()
    metric.update(torch.tensor([[1, 0]]), torch.tensor([[1, 1]]), 4)
    assert metric.compute() == pytest.approx(0.5)


def test_random_episodes_against_scikit_learn():
    rng = np.random.default_rng(0)
    metrics, seen = few_shot_metrics(), {}
    for _ in range(6):
        prediction = rng.integers(0, 2, (4, 9, 11))
        target = rng.choice([0, 1, 255], (4, 9, 11), p=[0.5, 0.4, 0.1])
        classes = rng.integers(0, 5, 4)
        metrics.update(*(torch.from_numpy(x) for x in (prediction, target, classes)))
        for p, t, c in zip(prediction, target, classes, strict=True):
            seen.setdefault(int(c), []).append((p[t < 255], t[t < 255]))
    joined = {c: [np.concatenate(x) for x in zip(*parts, strict=True)] for c, parts in seen.items()}
    every = [np.concatenate(x) for x in zip(*joined.values(), strict=True)]
    scores = metrics.compute()
    expected = [jaccard_score(t, p) for p, t in joined.values()]
    assert scores["mIoU"] == pytest.approx(np.mean(expected), abs=1e-6)
    fb = [jaccard_score(every[1], every[0], pos_label=side) for side in (0, 1)]
    assert scores["FB_IoU"] == pytest.approx(np.mean(fb), abs=1e-6)


def test_parts_of_two_processes_add_up():
    """Counts are summed before anything is divided, as under DDP."""
    torch.manual_seed(0)
    scores = FewShotMeanIoU, ForegroundBackgroundIoU
    whole, parts = few_shot_metrics(), [[score() for score in scores] for _ in range(2)]
    for index in range(6):
        prediction, target = torch.rand(2, 8, 8) > 0.5, (torch.rand(2, 8, 8) > 0.7).long()
        arguments = prediction, target, torch.tensor([index % 3, 5]), torch.tensor([0, 1, 2, 5, 8])
        whole.update(*arguments)
        for metric in parts[index % 2]:
            metric.update(*arguments)
    expected = whole.compute()
    for name, first, second in zip(("mIoU", "FB_IoU"), *parts, strict=True):
        first.merge_state(second)
        assert first.compute() == expected[name]


@pytest.mark.parametrize("metric", [FewShotMeanIoU, ForegroundBackgroundIoU])
def test_hostile(metric):
    score = metric()
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert score.compute().isnan()
    score.update(torch.ones(3, 3), torch.full((3, 3), 255), 2)  # nothing counts
    assert score.compute() == 0
    score.reset()
    score.update(torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 1), 254)  # one pixel, last class
    assert score.compute() == pytest.approx(1 if metric is FewShotMeanIoU else 0.5)
    with pytest.raises(ValueError, match=r"predictions are \(2, 3\) and targets \(3, 3\)"):
        score.update(torch.ones(2, 3), torch.ones(3, 3), 1)
    with pytest.raises(ValueError, match="class_index holds 1 classes for 2 episodes"):
        score.update(torch.ones(2, 3, 3), torch.ones(2, 3, 3), 1)


def test_many_pixels_do_not_overflow():
    """Sums beyond 2**24, where float32 stops counting."""
    metric = ForegroundBackgroundIoU()
    metric.union[0] += 2**40
    metric.intersection[0] += 2**40
    metric.listed[0] = 1
    metric._update_count = 1
    metric.update(torch.tensor([[1, 0]]), torch.tensor([[0, 1]]), 0)
    assert metric.union[0].tolist() == [2**40 + 2] * 2
    assert metric.compute() == pytest.approx(1)
