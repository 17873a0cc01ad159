"""COCO-20i for Lightning."""

from pathlib import Path
from typing import Literal

from lightning_genseg.data.episodes.datamodule import EpisodesDataModule
from lightning_genseg.data.episodes.dataset import EpisodeMode
from lightning_genseg.data.sets.coco import COCODataModule


class COCO20iDataModule(EpisodesDataModule):
    """COCO-20i: four interleaved folds of twenty classes, as BAM has it: `EpisodesDataModule` over `COCODataModule`.

    21 917, 41 809, 43 045 and 44 614 of the 82 081 training images remain in folds 0 to 3, and 26
    052, 15 305, 13 138 and 12 640 of the 40 137 validation images. BAM's first thousand queries
    need the order of its `val_list`.

    Source: Nguyen, Todorovic: Feature weighting and boosting for few-shot segmentation, ICCV 2019.

    Args:
        root: folder that holds train2014, val2014 and annotations; not needed for prediction.
        fold: whose classes are novel: fold + 1, fold + 5, fold + 9 ...
        train_list: see `COCODataModule`, like the next two.
        val_list: see there.
        convert: see there.
        shots: see `EpisodesDataModule`, like all that follow.
        size: see there.
        min_area: see there.
        novel_setting: see there.
        mode: see there.
        episodes: see there.
        val_episodes: see there.
        test_seed: see there.
        val_classes: see there.
        manifest: see there.
        batch_size: see there.
        num_workers: see there.
        seed: see there.
        support_root: see there.
        support_ids: see there.
        predict_root: see there.
        cache_dir: see there.
    """

    def __init__(
        self,
        root: Path,
        fold: int,
        train_list: Path | None = None,
        val_list: Path | None = None,
        convert: bool = False,
        shots: int = 1,
        size: int = 641,
        min_area: int = 2048,
        novel_setting: Literal["remove", "background"] = "remove",
        mode: EpisodeMode = "bam",
        episodes: int = 1000,
        val_episodes: int = 1000,
        test_seed: int = 510,
        val_classes: Literal["novel", "base"] = "novel",
        manifest: Path | None = None,
        batch_size: int = 8,
        num_workers: int = 2,
        seed: int = 0,
        support_root: Path | None = None,
        support_ids: dict[int, int] | None = None,
        predict_root: Path | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        super().__init__(
            COCODataModule(root, train_list, val_list, convert),
            folds="coco20i",
            fold=fold,
            shots=shots,
            size=size,
            min_area=min_area,
            novel_setting=novel_setting,
            mode=mode,
            episodes=episodes,
            val_episodes=val_episodes,
            test_seed=test_seed,
            val_classes=val_classes,
            manifest=manifest,
            scale=(0.8, 1.25),
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            support_root=support_root,
            support_ids=support_ids,
            predict_root=predict_root,
            cache_dir=cache_dir,
        )
