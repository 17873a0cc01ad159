import pytest
import torch

from lightning_genseg.ops.resize import labelled_cells


@pytest.mark.parametrize("size", [(7, 9), (16, 24), (1, 1), (20, 30)])
def test_most_frequent_label_of_each_cell(size):
    mask = torch.randint(-1, 6, (3, 16, 24))  # -1, 3, 4 and 5 are no classes
    cells = labelled_cells(mask, size, 3)
    row = torch.arange(16) * size[0] // 16
    column = torch.arange(24) * size[1] // 24
    for b, i, j in torch.cartesian_prod(*map(torch.arange, cells.shape)).tolist():
        inside = mask[b][row == i][:, column == j]
        counts = [(inside == c).sum() for c in range(3)]
        assert cells[b, i, j] == (255 if max(counts) == 0 else counts.index(max(counts)))
