"""Which classes of a data set are novel, which are base classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from lightning_genseg.data.sets.coco import COCO
from lightning_genseg.data.sets.voc import VOC
from lightning_genseg.errors import GenSegError, MissingFileError, did_you_mean
from lightning_genseg.files import read_json

Folds: TypeAlias = Literal["pascal5i", "coco20i"] | Path
"""Classes by folds: those of the papers, or a JSON file `{"folds": [[name, ...], ...]}`."""


class FewShotClasses(NamedTuple):
    """Numbers of the classes, in the order of the data set."""

    novel: list[int]  # unknown to training
    base: list[int]  # known


def few_shot_classes(
    class_names: Sequence[str],
    novel_classes: Sequence[str] | None,
    folds: Folds | None,
    fold: int | None,
    background_classes: Sequence[str] | None,
) -> FewShotClasses:
    """Part the classes of a data set as the arguments of `EpisodesDataModule` say.

    Raises:
        GenSegError: neither or both of names and fold, none such, or no base class is left.
    """
    if (novel_classes is None) == (folds is None) or (folds is None) != (fold is None):
        raise GenSegError("the novel classes are not known: give novel_classes, or folds and fold.")
    if folds is not None and fold is not None:
        groups = read_folds(folds)
        if not 0 <= fold < len(groups):
            raise GenSegError(f"fold is {fold} but '{folds}' has 0 to {len(groups) - 1}.")
        novel_classes = groups[fold]
    novel = list(novel_classes or ())
    if background_classes is None:
        background_classes = [name for name in class_names if name == "background"]
    for argument, given in (("novel_classes", novel), ("background_classes", background_classes)):
        wrong = [name for name in given if name not in class_names]
        if wrong:
            raise GenSegError(
                f"{argument} holds '{wrong[0]}', which is no class"
                f"{did_you_mean(wrong[0], class_names)}"
            )
    both = [name for name in novel if name in background_classes]
    if both:
        raise GenSegError(
            f"'{both[0]}' is in novel_classes and in background_classes: take it out of one of "
            "them."
        )
    base = [name for name in class_names if name not in {*novel, *background_classes}]
    if not novel or not base:
        raise GenSegError(
            f"there are {len(novel)} novel and {len(base)} base classes: leave at least one of "
            "each."
        )
    position = {name: index for index, name in enumerate(class_names)}
    return FewShotClasses(
        sorted({position[name] for name in novel}), [position[name] for name in base]
    )


def read_folds(folds: Folds) -> list[list[str]]:
    """Names of the classes of each fold; GenSegError if a file does not hold them."""
    if str(folds) == "pascal5i":  # fold i: classes 5i + 1 to 5i + 5
        return [list(VOC.CLASS_NAMES[5 * i + 1 : 5 * i + 6]) for i in range(4)]
    if str(folds) == "coco20i":  # interleaved, as in FWB, PFENet and BAM: i + 1, i + 5, i + 9 ...
        return [list(COCO.CLASS_NAMES[i + 1 :: 4]) for i in range(4)]
    path = Path(folds)
    if not path.is_file():
        raise MissingFileError(
            f"folds '{path}' does not exist: give pascal5i, coco20i or a JSON file of class names."
        )
    try:
        groups = read_json(path, "folds")["folds"]
    except (KeyError, TypeError):  # of another form
        groups = None
    if not isinstance(groups, list) or not all(
        isinstance(group, list) and all(isinstance(name, str) for name in group) for group in groups
    ):
        raise GenSegError(f"folds '{path}' must hold {{\"folds\": [[class name, ...], ...]}}.")
    return groups
