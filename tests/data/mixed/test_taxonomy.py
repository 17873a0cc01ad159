"""The table of universal classes: labels there, scores back, and what may be wrong with it."""

import re

import numpy as np
import pytest
import torch

from lightning_genseg.data import Taxonomy

ROWS = """# two domains
universal\tdataset\tclass
sky\ttown\tsky
road\ttown\troad
road\ttown\tcrossing
grass\ttown\tlawn
unlabelled\ttown\tmisc
sky\tfield\theaven
road\tfield\tground
grass\tfield\tground
boat\t\t
unlabelled\tfield\tstone
"""
TOWN = ["sky", "crossing", "misc", "road", "lawn"]
FIELD = ["stone", "heaven", "ground"]
COLORS = [(1, 1, 1), (2, 2, 2), (3, 3, 3)]


@pytest.fixture
def taxonomy(tmp_path):
    def make(text=ROWS, name="table.tsv"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return Taxonomy(tmp_path / name)

    return make


def test_labels_become_universal(taxonomy):
    table = taxonomy()
    assert table.class_names == ["sky", "road", "grass", "boat"]
    labels = table.universal_labels("town", TOWN)
    assert labels.dtype == np.uint8
    assert labels[:5].tolist() == [0, 1, 255, 1, 2]
    assert (labels[5:] == 255).all()


@pytest.mark.parametrize("order", ["dataset,class,universal", "universal,dataset,class"])
def test_commas_and_the_order_of_columns(taxonomy, order):
    lines = [line.split("\t") for line in ROWS.splitlines()[2:]]
    where = [["universal", "dataset", "class"].index(name) for name in order.split(",")]
    text = "\n".join([order, *(",".join(line[i] for i in where) for line in lines)])
    table = taxonomy("\ufeff" + text, "table.csv")  # as spreadsheets save it
    assert table.class_names == ["sky", "road", "grass", "boat"]
    assert table.universal_labels("town", TOWN)[:5].tolist() == [0, 1, 255, 1, 2]


def test_the_wide_table_of_mseg(taxonomy):
    """Columns as in MSeg_master.tsv, some of which are no data sets."""
    text = (
        "Parent Category\ttown\tuniversal\tDefn\tfield\n"
        'a\tsky\tsky\t"a ""b"" c"\theaven\n'
        "\t{road, crossing}\troad\t\tground\n"
        "\tlawn\tgrass\t\tground\n"
        "\t\tboat\t\t\n"
        "\t{misc}\tunlabeled\n"
    )
    table = taxonomy(text)
    assert table.class_names == ["sky", "road", "grass", "boat"]
    assert table.universal_labels("town", TOWN)[:5].tolist() == [0, 1, 255, 1, 2]
    with pytest.raises(ValueError, match=r"lacks 1 classes of field \(stone\): add a row"):
        table.target_classes("field", FIELD, COLORS)
    target, labels = table.target_classes("field", FIELD, COLORS, without_universal="wrong")
    assert target.class_names == FIELD
    assert labels[:4].tolist() == [0, 1, 2, 255]
    assert target.members.int().tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0]]


def test_classes_of_a_test_set(taxonomy):
    target, labels = taxonomy().target_classes("field", FIELD, COLORS)
    assert target.class_names == ["heaven", "ground"]
    assert target.palette == COLORS[1:]
    assert target.members.int().tolist() == [[1, 0, 0, 0], [0, 1, 1, 0]]
    assert labels[:4].tolist() == [255, 0, 1, 255]


def target_of(taxonomy, decision):
    return taxonomy().target_classes("field", FIELD, COLORS, decision)[0]


def pixels(*scores):
    """Scores U of some pixels as 1 x U x 1 x pixels."""
    return torch.tensor(scores).T[None, :, None]


def test_soft_adds_up_probabilities(taxonomy):
    # road and grass are 0.3 each: together more than the sky's 0.4. The rest of the last pixel is
    # boat.
    given = pixels([0.4, 0.3, 0.3, 0.0], [0.5, 0.2, 0.2, 0.1], [0.04, 0.03, 0.03, 0.9])
    soft = target_of(taxonomy, "soft").probabilities(given.clamp_min(1e-30).log())
    expected = pixels([0.4, 0.6], [0.5 / 0.9, 0.4 / 0.9], [0.4, 0.6])
    torch.testing.assert_close(soft, expected)
    hard = target_of(taxonomy, "hard").probabilities(given.clamp_min(1e-30).log())
    # Of the last pixel the best class leads nowhere: nothing is left, and argmax gives class 0.
    assert hard.equal(pixels([1.0, 0.0], [1.0, 0.0], [0.0, 0.0]))
    assert hard.argmax(1).flatten().tolist() == [0, 0, 0]


def test_soft_is_the_matrix_product_of_mseg(taxonomy):
    logits = torch.randn(2, 4, 3, 5, dtype=torch.float64) * 3
    target = target_of(taxonomy, "soft")
    product = torch.einsum("tu,buhw->bthw", target.members.double(), logits.softmax(1))
    ours = target.probabilities(logits)
    assert ours.argmax(1).equal(product.argmax(1))
    torch.testing.assert_close(ours.double(), product / product.sum(1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_underflow(taxonomy, dtype):
    """Log-densities of hundreds: the test set's classes are exp(-900) probable together."""
    scores = pixels([-1000.0, -920.0, -918.0, 0.0]).to(dtype)
    assert (scores.float().softmax(1)[:, :3] == 0).all()
    soft = target_of(taxonomy, "soft").probabilities(scores)
    assert soft.dtype == torch.float32
    assert soft.isfinite().all()
    assert soft.argmax(1).item() == 1


def test_one_dominant_class(taxonomy):
    scores = pixels([800.0, -800.0, -800.0, -800.0])
    assert target_of(taxonomy, "soft").probabilities(scores).equal(pixels([1.0, 0.0]))


LONG = "universal\tdataset\tclass\n"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "must begin with the columns universal, dataset, class, separated by tabs"),
        ("a\tb\nc\td\n", "must begin with the columns"),
        (LONG, "has 0 universal classes but must have 1 to 255"),
        (LONG + "unlabelled\ta\tb\n", "has 0 universal classes"),
        (LONG + "".join(f"c{i}\t\t\n" for i in range(256)), "has 256 universal classes"),
        (LONG + "\nsky\ttown\n", "line 3 of taxonomy .* is no row of universal, dataset, class"),
        (LONG + "sky\t\tsky\n", "line 2 of taxonomy .* both a data set and its class, or neither"),
        (LONG + "\ttown\tsky\n", "line 2 of taxonomy .*: give a universal class"),
        (LONG + "sky\ttown\tsky\tblue\n", "line 2 of taxonomy"),
    ],
)
def test_wrong_tables(taxonomy, text, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        taxonomy(text)
    assert "table.tsv'" in str(error.value)


@pytest.mark.parametrize(
    ("extra", "dataset", "names", "sentence"),
    [
        ("", "twon", TOWN, "has no data set twon; did you mean town"),
        ("", "town", [*TOWN, "car", "bus"], r"lacks 2 classes of town \(car, bus\): add a row"),
        ("", "town", TOWN[1:], "has the class 'sky' of town, which that data set has not; known"),
        ("", "field", FIELD, r"from the class 'ground' of field to several .* \(road, grass\): a"),
        ("unlabelled\ttown\tsky\n", "town", TOWN, r"'sky' of town .*\(sky, unlabelled\)"),
    ],
)
def test_labels_that_do_not_fit(taxonomy, extra, dataset, names, sentence):
    with pytest.raises(ValueError, match=sentence):
        taxonomy(ROWS + extra).universal_labels(dataset, names)


@pytest.mark.parametrize(
    ("text", "names", "sentence"),
    [
        (ROWS, [*FIELD, "sea"], r"lacks 1 classes of field \(sea\)"),
        (ROWS, FIELD[:2], "has the class 'ground' of field"),
        (ROWS + "sky\tfield\tcloud\n", [*FIELD, "cloud"],
         r"leads from 'sky' to several classes of field \(heaven, cloud\), which no prediction"),
        (LONG + "sky\ttown\tsky\nunlabelled\tfield\tstone\n", ["stone"],
         "leads to no class of field: nothing is left to score"),
    ],
)  # fmt: skip
def test_targets_that_do_not_fit(taxonomy, text, names, sentence):
    with pytest.raises(ValueError, match=sentence):
        taxonomy(text).target_classes("field", names, COLORS * 2)


@pytest.mark.parametrize("choice", [{"decision": "firm"}, {"without_universal": "right"}])
def test_unknown_choices(taxonomy, choice):
    with pytest.raises(ValueError, match=f"^{next(iter(choice))} is"):
        taxonomy().target_classes("field", FIELD, COLORS, **choice)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"taxonomy '{tmp_path}' does not exist")):
        Taxonomy(tmp_path)
