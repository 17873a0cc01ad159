import json

import numpy as np
import pytest
from scipy.spatial.distance import pdist

from lightning_genseg.methods.gss.colors import class_colors


@pytest.mark.parametrize("num_classes", [2, 7, 11, 19, 60])
@pytest.mark.parametrize(
    "kind", ["arithmetic", "misaligned", "jittered", "lattice", "repulsion", "random"]
)
def test_any_number_of_classes(kind, num_classes):
    table = class_colors(kind, num_classes)
    assert len(table) == num_classes + 1
    assert len(set(table)) == num_classes + 1  # unlabelled pixels have a colour of their own
    assert all(isinstance(v, int) and 0 <= v <= 255 for color in table for v in color)


@pytest.mark.parametrize("kind", ["arithmetic", "misaligned", "jittered", "lattice"])
def test_unlabelled_pixels_are_far_from_all_classes(kind):
    """Also where the classes fill the lattice, whose first point is nearly black: 8, 12, 18."""
    for num_classes in range(2, 256):
        *classes, unlabelled = np.array(class_colors(kind, num_classes))
        nearest = np.linalg.norm(np.array(classes) - unlabelled, axis=1).min()
        assert nearest > 20, num_classes


def test_the_steps_of_table_9():
    """Equal steps in lattice order, blue fastest; starts 0, 1, 2; 0 to 15 more per channel."""
    plain, shifted, jittered = (
        np.array(class_colors(kind, 150)[:-1]) for kind in ("arithmetic", "misaligned", "jittered")
    )
    assert len(set(map(tuple, plain[:, :2]))) == 5 * 6  # 5 x 6 x 5, as the table of ADE20K
    for channel, levels in enumerate((5, 6, 5)):
        assert np.ptp(np.diff(np.unique(plain[:, channel]))) == 0
        assert len(np.unique(plain[:, channel])) == levels
    assert plain.tolist() == sorted(plain.tolist())
    assert (shifted - plain == [0, 1, 2]).all()
    noise = jittered - shifted
    assert (noise.min(), noise.max()) == (0, 15)
    assert all(len(np.unique(noise[:, channel])) > 8 for channel in range(3))


def test_seeds():
    for kind in ("jittered", "repulsion", "random"):
        assert class_colors(kind, 9, 1) == class_colors(kind, 9, 1)
        assert class_colors(kind, 9, 1) != class_colors(kind, 9, 2)
    assert class_colors("lattice", 9, 1) == class_colors("lattice", 9, 2)


def test_smallest_distances():
    def distance(kind, num_classes):
        return pdist(class_colors(kind, num_classes)[:-1]).min()

    assert [distance("lattice", k) for k in (19, 150, 194)] == [127, 51, 51]
    assert distance("repulsion", 11) > 150 > distance("lattice", 11)
    # As the published tables were measured.
    tables = {"cityscapes": 19, "ade20k": 150, "mseg": 194}
    found = [distance(kind, k) for kind, k in tables.items()]
    np.testing.assert_allclose(found, [20.0, 20.025, 18.682], atol=1e-3)


def test_published_tables():
    cityscapes, ade, mseg = (
        class_colors(*pair) for pair in (("cityscapes", 19), ("ade20k", 150), ("mseg", 194))
    )
    assert (cityscapes[0], cityscapes[-1]) == ((128, 64, 128), (0, 0, 0))
    assert (ade[0], ade[148], ade[-1]) == ((222, 222, 145), (0, 0, 0), (215, 216, 196))
    # MSeg's are a lattice of 5 x 5 x 8 without its first 6 points, each up to 15 below its place.
    places = [
        (r, g, b)
        for r in range(15, 236, 55)
        for g in range(16, 221, 51)
        for b in range(17, 249, 33)
    ]
    below = np.array(places[6:]) - np.array(mseg[:-1])
    assert (below.min(), below.max()) == (0, 15)
    with pytest.raises(ValueError, match=r"colors ade20k is for 150 classes .* but there are 11"):
        class_colors("ade20k", 11)


def test_published_tables_are_those_of_the_spec(shared_dir):
    spec = json.loads((shared_dir / "specs" / "gss_palettes.json").read_text())
    for kind, count in {"cityscapes": 19, "ade20k": 150, "mseg": 194}.items():
        assert [list(c) for c in class_colors(kind, count)] == spec[f"{kind}_{count}"]


def test_files_and_lists(tmp_path):
    table = [[1, 2, 3], [4, 5, 6], [0, 0, 0]]
    path = tmp_path / "colors.json"
    path.write_text(json.dumps(table))
    assert class_colors(path, 2) == class_colors(table, 2) == [tuple(color) for color in table]
    with pytest.raises(ValueError, match=r"colors\.json' is for 2 classes .* but there are 3"):
        class_colors(path, 3)
    with pytest.raises(FileNotFoundError, match=r"'latice' is no file: .* lattice"):
        class_colors("latice", 3)
    for content in ('{"a": 1}', "[[1, 2], [3, 4]]", "[[1, 2, 256], [1, 2, 3], [0, 0, 0]]"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"colors\.json' must be a list of \[red, green"):
            class_colors(path, 2)
    path.write_text("red")
    with pytest.raises(ValueError, match=r"colors\.json' is no JSON"):
        class_colors(path, 2)
