"""One taxonomy for several data sets: universal classes, and what becomes of labels and scores."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_genseg.arguments import check_arguments
from lightning_genseg.data.labels import IGNORE, Color
from lightning_genseg.errors import GenSegError, MissingFileError, did_you_mean, listed
from lightning_genseg.files import read_text

Decision = Literal["soft", "hard"]
WithoutUniversal = Literal["refuse", "wrong"]
_UNLABELLED = ("unlabelled", "unlabeled")
_COLUMNS = ["universal", "dataset", "class"]


class TargetClasses(NamedTuple):
    """Classes of a test set, and which universal classes each of them consists of.

    MSeg's matrix P: Lambert et al.: MSeg, CVPR 2020, Sec. 5 (soft); GSS' code decides for a
    universal class first (hard).
    """

    class_names: list[str]  # T
    palette: list[Color]  # T
    members: Tensor  # T x U bool
    decision: Decision

    def probabilities(self, log_scores: Tensor) -> Tensor:
        """Probabilities B x T x H x W of the test set's classes, whose argmax is the prediction.

        `soft`: the universal probabilities of a class are added up, and divided by what the classes
        of the test set have together: that the pixel is in one of them is known. `hard`: 1 for the
        class of the most probable universal class, 0 for all others; where that leads to no class
        of the test set all are 0, and the prediction is its first class, as in GSS' and MSeg's
        code.

        Args:
            log_scores: B x U x H x W, logits or logarithms of probabilities.
        """
        members = self.members.to(log_scores.device)
        if self.decision == "hard":
            best: Tensor = members.T[log_scores.argmax(1)].movedim(-1, 1).float()
            return best
        scores = log_scores[:, members.any(0)].float()
        # A pixel's best class may be -1000 where others, which lead nowhere, are 0: no sum may
        # underflow.
        likelihoods = (scores - scores.amax(1, keepdim=True)).exp()
        sums = torch.einsum("tu,buhw->bthw", members[:, members.any(0)].float(), likelihoods)
        return sums / sums.sum(1, keepdim=True)


class Taxonomy:
    """Universal classes, and which class of which data set is which of them.

    A table (.tsv, or .csv) with the columns `universal`, `dataset` and `class`, a row for each
    pair; lines that begin with # are comments. Universal classes are numbered in the order of their
    first row; one that no data set has stands in a row alone. The universal class `unlabelled` says
    that the pixels of a class are ignored (255). MSeg's `MSeg_master.tsv` can be read as well: a
    column for each data set beside `universal`, with `{a, b}` for two classes.

    Args:
        path: of the table.

    Raises:
        MissingFileError: no such file.
        GenSegError: no such table, or more than 255 universal classes.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise MissingFileError(f"taxonomy '{self.path}' does not exist: check the path.")
        self.class_names: list[str] = []
        # Data set -> its class -> universal classes.
        self._universal: dict[str, dict[str, set[int]]] = {}
        for universal, dataset, name in self._read():
            if universal not in (*_UNLABELLED, *self.class_names):
                self.class_names.append(universal)
            classes = self._universal.setdefault(dataset, {})
            if name:
                ignored = universal in _UNLABELLED
                number = IGNORE if ignored else self.class_names.index(universal)
                classes.setdefault(name, set()).add(number)
        self._universal.pop("", None)  # of universal classes alone
        if not 0 < len(self.class_names) <= IGNORE:
            raise GenSegError(
                f"taxonomy '{self.path}' has {len(self.class_names)} universal classes but must "
                "have 1 to 255."
            )

    def _read(self) -> list[tuple[str, str, str]]:
        """Universal class, data set and class of each row; the last two may be empty."""
        lines = read_text(self.path, "taxonomy").splitlines(keepends=True)
        reader = csv.reader(lines, delimiter="," if self.path.suffix == ".csv" else "\t")
        rows = [
            (reader.line_num, [cell.strip() for cell in row])
            for row in reader
            if any(cell.strip() for cell in row) and not row[0].startswith("#")
        ]
        header = rows[0][1] if rows else []
        if "universal" not in header or len(header) < 2:
            raise GenSegError(
                f"taxonomy '{self.path}' must begin with the columns {', '.join(_COLUMNS)}, "
                "separated by tabs (.csv: by commas)."
            )
        found: list[tuple[str, str, str]] = []
        for line, cells in rows[1:]:
            cells += [""] * (len(header) - len(cells))
            row = dict(zip(header, cells, strict=False))
            universal = row.pop("universal")
            whole = bool(universal) and len(cells) == len(header)
            if set(header) == set(_COLUMNS):
                whole &= bool(row["dataset"]) == bool(row["class"])
                row = {row["dataset"]: row["class"]}
            if not whole:
                raise GenSegError(
                    f"line {line} of taxonomy '{self.path}' is no row of {', '.join(header[:3])}: "
                    "give a universal class, and both a data set and its class, or neither."
                )
            for dataset, cell in row.items():
                names = cell[1:-1].split(",") if cell.startswith("{") else [cell]
                found += [(universal, dataset, name.strip()) for name in names]
        return found

    def universal_labels(self, dataset: str, class_names: Sequence[str]) -> NDArray[np.uint8]:
        """Lookup table of 256: class of a data set -> universal class, or 255.

        Raises:
            GenSegError: the table does not have exactly these classes, each once.
        """
        universal = self._classes(dataset, class_names)
        table = np.full(IGNORE + 1, IGNORE, np.uint8)
        for index, name in enumerate(class_names):
            if len(universal[name]) > 1:
                names = [*self.class_names, *[_UNLABELLED[0]] * IGNORE]
                several = listed(names[number] for number in sorted(universal[name]))
                raise GenSegError(
                    f"taxonomy '{self.path}' leads from the class '{name}' of {dataset} to several "
                    f"universal classes ({several}): a training set needs one."
                )
            table[index] = next(iter(universal[name]))
        return table

    def target_classes(
        self,
        dataset: str,
        class_names: Sequence[str],
        palette: Sequence[Color],
        decision: Decision = "soft",
        without_universal: WithoutUniversal = "refuse",
    ) -> tuple[TargetClasses, NDArray[np.uint8]]:
        """Classes of a test set to be scored on, and a lookup table of 256: class -> their number.

        Classes that the table calls `unlabelled` are left out; they are 255 in the lookup table.

        Args:
            dataset: its name in the table.
            class_names: of the test set.
            palette: of the test set.
            decision: see `TargetClasses.probabilities`.
            without_universal: what becomes of classes that the table does not have: `refuse`, or
                `wrong`, they stay and are never predicted.

        Raises:
            GenSegError: the table does not have exactly these classes, or leads from a universal
                class to several of them.
        """
        check_arguments(Taxonomy.target_classes, locals())
        universal = self._classes(dataset, class_names, without_universal)
        members = torch.zeros(len(class_names), len(self.class_names), dtype=torch.bool)
        for index, name in enumerate(class_names):
            members[index, sorted(universal.get(name, set()) - {IGNORE})] = True
        several = (members.sum(0) > 1).nonzero().flatten().tolist()
        if several:
            names = [class_names[i] for i in members[:, several[0]].nonzero().flatten().tolist()]
            raise GenSegError(
                f"taxonomy '{self.path}' leads from '{self.class_names[several[0]]}' to several "
                f"classes of {dataset} ({listed(names)}), which no prediction can tell apart: make "
                "them one class of the test set (ids of FolderDataModule), or leave all but one "
                "unlabelled."
            )
        kept = [i for i, name in enumerate(class_names) if universal.get(name) != {IGNORE}]
        if not members.any():
            raise GenSegError(
                f"taxonomy '{self.path}' leads to no class of {dataset}: nothing is left to score."
            )
        table = np.full(IGNORE + 1, IGNORE, np.uint8)
        table[kept] = range(len(kept))
        target = TargetClasses(
            [class_names[i] for i in kept], [palette[i] for i in kept], members[kept], decision
        )
        return target, table

    def _classes(
        self, dataset: str, class_names: Sequence[str], without: WithoutUniversal = "refuse"
    ) -> dict[str, set[int]]:
        """Universal classes of each class of a data set, compared with the classes that it has."""
        if dataset not in self._universal:
            raise GenSegError(
                f"taxonomy '{self.path}' has no data set {dataset}"
                f"{did_you_mean(dataset, self._universal)}"
            )
        universal = self._universal[dataset]
        foreign = [name for name in universal if name not in class_names]
        if foreign:
            raise GenSegError(
                f"taxonomy '{self.path}' has the class '{foreign[0]}' of {dataset}, which that "
                f"data set has not{did_you_mean(foreign[0], class_names)}"
            )
        lacking = [name for name in class_names if name not in universal]
        if lacking and without == "refuse":
            raise GenSegError(
                f"taxonomy '{self.path}' lacks {len(lacking)} classes of {dataset} "
                f"({listed(lacking)}): add a row for each, with unlabelled as the universal class "
                "to ignore it."
            )
        return universal
