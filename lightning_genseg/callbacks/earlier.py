"""What an output folder of `genseg predict` holds before a run writes to it."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_genseg.callbacks.manifest import Manifest, place
from lightning_genseg.errors import GenSegError

TABLE = "classes.json"


class EarlierPredictions:
    """Predictions and other files that are there already, and what a run may do to them.

    Args:
        manifest: of the output folder.
        resume: leave out the images that it lists.
        overwrite: write over what it lists.

    Attributes:
        lines: of the predictions that a resumed run goes on with.

    Raises:
        GenSegError: there are predictions, and neither `resume` nor `overwrite` is set.
    """

    def __init__(self, manifest: Manifest, resume: bool, overwrite: bool) -> None:
        self._manifest, self._folder = manifest, manifest.folder
        self._resume, self._overwrite = resume, overwrite
        self.lines: list[dict[str, Any]] = []
        if resume:
            self.lines = [line for line in manifest.read() if not line.get("stale")]
        elif manifest.exists() and not overwrite:
            raise GenSegError(
                f"{self._folder} already holds predictions: set --predictions.resume true to go "
                "on, --predictions.overwrite true to start anew, or another "
                "--predictions.output_dir."
            )
        self._foreign = manifest.foreign()  # files that no run of ours has written
        if (self._folder / TABLE).exists() and not manifest.is_begun():
            self._foreign.add(TABLE)

    def leave_out(self, images: Any, support: str | None) -> None:
        """Take out of the images to predict what is predicted already, or is a prediction.

        Raises:
            GenSegError: resuming with data that cannot skip, another support, or other images of
                the same name; nothing but predictions to predict.
        """
        if images is not None and (self._resume or self._overwrite):
            self._leave_out_predictions(images)
        if not self._resume:
            return
        if images is None:
            raise GenSegError(
                "resume needs a datamodule whose predict_dataset can skip images: "
                "pass datamodule= to Trainer.predict, or leave resume out."
            )
        paths = {name: str(Path(path).absolute()) for name, path in images.samples}
        for line in self.lines:
            if line.get("support") != support:
                raise GenSegError(
                    f"{self._folder} holds predictions by another support (or size of it): use "
                    "that one, or another output_dir."
                )
            if line["image"] != paths.get(line["name"], line["image"]):
                raise GenSegError(
                    f"{self._folder} holds a prediction named {line['name']} of {line['image']}, "
                    f"not of {paths[line['name']]}: give these images another output_dir."
                )
        done = {line["name"] for line in self.lines if self._manifest.is_complete(line)}
        images.skip(done)
        rank_zero_info(f"{len(done)} images are already predicted, {len(images)} are left.")

    def _leave_out_predictions(self, images: Any) -> None:
        """An output folder inside the input: what an earlier run wrote is not to be predicted."""
        own = {(self._folder / file).absolute() for file in self._manifest.own()}
        images.skip({name for name, path in images.samples if Path(path).absolute() in own})
        if not images.samples:
            raise GenSegError(
                f"'{images.root}' holds only what genseg predict has written: give another "
                "predict_root."
            )

    def check_model(
        self, checkpoint: str | None, score: str | None, threshold: float | None
    ) -> None:
        """Refuse to mix predictions of two checkpoints, or of two thresholds."""
        for line in self.lines:
            if line["checkpoint"] != checkpoint:
                raise GenSegError(
                    f"{self._folder} holds predictions of the checkpoint {line['checkpoint']}, "
                    f"not of {checkpoint}: use that checkpoint, or another output_dir."
                )
            theirs = line.get("anomaly_score"), line.get("anomaly_threshold")
            if theirs != (score, threshold):
                raise GenSegError(
                    f"{self._folder} holds predictions with the anomaly score {theirs[0]} and "
                    f"threshold {theirs[1]}, and this model has {score} and {threshold}: use "
                    "these, or another output_dir."
                )

    def refuse_foreign(self, images: Any, kinds: Sequence[str]) -> None:
        """Refuse at once what `refuse` would refuse when it is written."""
        names = [] if images is None else [name for name, _ in images.samples]
        self.refuse({TABLE, *(place(kind, name) for name in names for kind in kinds)})

    def refuse(self, files: Collection[str]) -> None:
        """Refuse to write over files that are not ours."""
        if found := sorted(self._foreign.intersection(files)):
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise GenSegError(
                f"'{self._folder / found[0]}'{more} would be written over, and genseg predict did "
                "not write it: move it away, or give another --predictions.output_dir."
            )
