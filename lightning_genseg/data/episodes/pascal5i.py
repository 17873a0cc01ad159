"""PASCAL-5i for Lightning."""

from pathlib import Path
from typing import Literal

from lightning_genseg.data.episodes.datamodule import EpisodesDataModule
from lightning_genseg.data.episodes.dataset import EpisodeMode
from lightning_genseg.data.sets.voc import VOCDataModule


class Pascal5iDataModule(EpisodesDataModule):
    """PASCAL-5i: four folds of five of VOC's classes, as BAM has it: `EpisodesDataModule` over `VOCDataModule`.

    Training: `VOC`'s split `pascal5i` (5953 images), of which 4208, 3726, 2752 and 4510 remain in
        folds 0 to 3
    (`novel_setting` background: 4760, 4588, 4097, 5108). Validation and test: 364, 445, 592 and 336
    of the 1449 validation images.

    Source: Shaban et al.: One-shot learning for semantic segmentation, BMVC 2017; the lists are
        PFENet's.

    Args:
        root: folder that holds JPEGImages, usually VOCdevkit/VOC2012; not needed for prediction.
        fold: whose classes are novel: 5 fold + 1 to 5 fold + 5.
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
        shots: int = 1,
        size: int = 473,
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
            VOCDataModule(root, "pascal5i"),
            folds="pascal5i",
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
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            support_root=support_root,
            support_ids=support_ids,
            predict_root=predict_root,
            cache_dir=cache_dir,
        )
