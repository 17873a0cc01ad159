"""The check of a batch; what sparse batches must be: see sparse/test_datamodule.py."""

import pytest
import torch

from lightning_genseg.data.checks import check_batch
from lightning_genseg.errors import GenSegError

LONG = torch.int64


def batch(**changes):
    image, mask = torch.rand(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    return {"image": image, "mask": mask, "name": ["a", "b"], **changes}


def one(value, like):
    """A tensor with a value at one place of the second image."""
    result = like.clone()
    result[1, ..., 2, 3] = value
    return result


def strange(value=1, **changes):
    anomaly = one(value, torch.zeros(2, 4, 5, dtype=LONG))
    mask = torch.where(anomaly == 1, 255, torch.ones_like(anomaly))
    return batch(**{"mask": mask, "anomaly": anomaly, **changes})


ZEROS = torch.zeros(2, 4, 5, dtype=LONG)
IGNORED = torch.full((2, 4, 5), 255)


@pytest.mark.parametrize(
    "good",
    [
        batch(),
        batch(mask=one(255, ZEROS)),
        {"image": torch.rand(1, 3, 4, 5), "name": ["a"]},
        strange(),
        strange(mask=IGNORED),  # data without classes
    ],
)
def test_good_batches(good):
    check_batch(good, 3)


IMAGE = torch.rand(2, 3, 4, 5)
# fmt: off
WRONG = [
    (batch(image=IMAGE.byte()), "'a' is uint8 of shape 2x3x4x5 but must be float32"),
    (batch(image=torch.rand(2, 4, 5, 3)), "shape 2x4x5x3 but must be float32 of shape Bx3xHxW"),
    (batch(image=[1, 2]), "'a' is list but must be"),
    (batch(image=IMAGE * 255), r"image 'a' holds values .* must lie in \[0, 1\]: divide by 255"),
    (batch(image=one(-1.5, IMAGE)), "image 'b' holds values from -1.5 to .*leave out Normalize"),
    (batch(image=one(float("nan"), IMAGE)), "image 'b' holds values from nan"),
    (batch(mask=ZEROS.float()), "'a' is float32 of shape 2x4x5 but must be int64 of shape 2x4x5"),
    (batch(mask=ZEROS[:, None]), "'a' is int64 of shape 2x1x4x5"),
    (batch(mask=ZEROS.mT), "int64 of shape 2x5x4 but must be int64 of shape 2x4x5"),
    (batch(mask=None), "mask of the batch with 'a' is NoneType"),
    (batch(mask=one(3, ZEROS)), "mask 'b' holds the labels 3 but there are 3 classes: use 0 to 2"),
    (batch(mask=one(-1, ZEROS)), "mask 'b' holds the labels -1"),
    (batch(mask=one(3, ZEROS), name=[]), "mask number 1 of the batch holds the labels 3"),
    (strange(2), "anomaly mask 'b' holds 2: use 1 for anomalous, 0 for known and 255"),
    (strange(mask=ZEROS), "mask 'b' names a class where the anomaly"),
    (strange(anomaly=ZEROS.float()), "anomaly of the batch with 'a' is float32 of shape"),
    (strange(anomaly=ZEROS.mT), "int64 of shape 2x5x4 but must be int64 of shape 2x4x5"),
]
# fmt: on


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_wrong_batches(wrong, message):
    with pytest.raises(GenSegError, match=message):
        check_batch(wrong, 3)


@pytest.mark.parametrize("ignored", [batch(mask=IGNORED), strange(mask=IGNORED, anomaly=IGNORED)])
def test_ignored_batches_are_warned_about(ignored):
    with pytest.warns(UserWarning, match=r"every pixel of the first batch \(a, b\) is ignored"):
        check_batch(ignored, 3)
