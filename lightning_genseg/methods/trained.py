"""What everything that is trained shares: a loss, mIoU, its arguments in checkpoints."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from inspect import signature
from io import BytesIO
from pathlib import Path
from typing import IO, Any, ClassVar, Self

import torch
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_genseg.arguments import check_arguments, check_device, check_ignored
from lightning_genseg.errors import GenSegError
from lightning_genseg.files import local_copy
from lightning_genseg.methods.checkpoints import (
    check_loading,
    guard_checkpoints,
    need_weights_only,
    plain,
    read_run,
)
from lightning_genseg.methods.hub import SharedModule
from lightning_genseg.methods.random_states import RandomStates
from lightning_genseg.metrics import named_scores, segmentation_metrics
from lightning_genseg.metrics.segmentation import better, score_keys
from lightning_genseg.ops.processes import over_processes
from lightning_genseg.ops.views import unit_image


class TrainedModule(SharedModule, ABC):
    """Base of all that is trained: a loss, mIoU, an optimiser, and its arguments in checkpoints.

    A subclass writes `compute_loss` and `maps_at_labels`. It passes on what it does not use itself
    as `**kwargs`. All arguments but those in `not_kept` are saved here, groups as plain values.

    Args:
        num_classes: C.
        ignore_index: label that does not count, in losses, EM and scores.
        class_names: C names for logs and reports; their numbers when left out.
    """

    # Arguments that no checkpoint keeps: functions and networks cannot be loaded safely.
    not_kept: ClassVar[tuple[str, ...]] = ("optimizer", "lr_scheduler", "features")
    # Where weights came from: a checkpoint holds them, nothing else is read to load it.
    sources: ClassVar[tuple[str, ...]] = ("encoder_weights",)
    # Chosen anew at every run of the command with a checkpoint; of these the data's word is final.
    chosen_anew: ClassVar[tuple[str, ...]] = ("num_classes", "ignore_index", "class_names")
    needs_training: bool = True  # whether it is random without a checkpoint
    batch_keys: ClassVar[tuple[str, ...]] = ("image", "mask")  # of training, validation and test

    def __init__(
        self,
        num_classes: int,
        ignore_index: int = 255,
        class_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        check_arguments(TrainedModule.__init__, locals(), num_classes="[2, inf)")
        super().__init__(**kwargs)
        if class_names is not None and len(class_names) != num_classes:
            raise GenSegError(
                f"class_names has {len(class_names)} entries and num_classes is {num_classes}; "
                "give one name per class, in the order of the class indices."
            )
        score_keys(class_names or ())
        check_ignored(num_classes, ignore_index)
        self.save_hyperparameters(ignore=self.not_kept)
        # Lightning takes those of a module around it as well. What begins with _ is LightningCLI's.
        written = [vars(cls)["__init__"] for cls in type(self).__mro__ if "__init__" in vars(cls)]
        own = {name for one in written for name in signature(one).parameters}
        for kept in (self.hparams, self._hparams_initial):
            assert isinstance(kept, dict)
            for name, value in list(kept.items()):
                # Networks and functions cannot be loaded safely: they are to be given again.
                foreign = name not in own and not name.startswith("_")
                if foreign or isinstance(value, nn.Module) or callable(value):
                    del kept[name]
            kept.update(plain(dict(kept)))
        self.num_classes, self.ignore_index = int(num_classes), int(ignore_index)
        self.class_names = plain(class_names)
        self.val_metrics = segmentation_metrics(num_classes, ignore_index)
        self.test_metrics = self.val_metrics.clone()

    @classmethod
    def load_from_checkpoint(
        cls, checkpoint_path: str | Path | IO[bytes], *args: Any, **kwargs: Any
    ) -> Self:
        """Build a module from a checkpoint, as Lightning does, without running what it names.

        Args:
            checkpoint_path: path or address (`https://`, `s3://`) of the file, or the file, open.
            args: Lightning's further arguments.
            kwargs: likewise by name, and arguments of the module that are to change.

        Raises:
            MissingFileError: there is no such file.
            DownloadError: nothing could be got from the address.
            GenSegError: it is no whole checkpoint, or names classes of others.
        """
        need_weights_only(kwargs.pop("weights_only", None))
        if isinstance(checkpoint_path, str | Path):
            source, name = local_copy(checkpoint_path), f"'{checkpoint_path}'"
        else:
            source, name = BytesIO(checkpoint_path.read()), "the checkpoint"
        check_loading(read_run(source, name), cls, kwargs)
        if isinstance(source, BytesIO):
            source.seek(0)
        options = {**kwargs, "weights_only": True}
        loaded: Self = super().load_from_checkpoint(source, *args, **options)
        return loaded

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As torch's; what does not fit is told in one sentence."""
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:  # torch's list of keys, one kind of problem a line
            lines = [" ".join(line.split()) for line in str(error).splitlines()[1:] if line.strip()]
            told = "; ".join(line[:120] + (" ..." if len(line) > 120 else "") for line in lines[:2])
            raise GenSegError(
                f"the checkpoint does not fit {type(self).__name__} with these arguments ({told}): "
                "give one of the same architecture."
            ) from error

    @property
    def all_class_names(self) -> list[str]:
        """`class_names`, or the numbers of the classes where these have no names."""
        return list(self.class_names or map(str, range(self.num_classes)))

    @abstractmethod
    def compute_loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`loss` to be minimised, its parts `loss_*` to be logged, and what EM needs afterwards.

        Args:
            batch: `image` B x 3 x H x W in [0, 1] and `mask` B x H x W int64.
        """

    @abstractmethod
    def maps_at_labels(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`scores` B x C x H x W, and other maps if any, at the size of the batch's `mask`."""

    def setup(self, stage: str) -> None:
        """Let the Trainer read and write checkpoints safely; refuse what would go wrong in it."""
        trainer = self._trainer
        if trainer is None:
            return
        guard_checkpoints(trainer)
        check_device(trainer.strategy.root_device)
        precision = str(trainer.precision)
        if precision != "32-true" and not precision.endswith("-mixed"):
            raise GenSegError(
                f"trainer.precision is {precision}, but mixtures, colours and scores need float32: "
                "take 32-true, bf16-mixed or 16-mixed."
            )
        if stage != "fit":
            return
        check_training(
            **{key: getattr(trainer, key) for key in signature(check_training).parameters}
        )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            monitor, mode = (getattr(callback, key, None) for key in ("monitor", "mode"))
            if monitor and better(monitor) not in (None, mode):
                raise GenSegError(
                    f"{type(callback).__name__} monitors {monitor} with mode {mode}, and would "
                    f"take the worst for the best: set its mode to {better(monitor)}."
                )

    def configure_callbacks(self) -> list[Callback]:
        """What every training needs; a subclass adds to it."""
        return [RandomStates()]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Loss of a batch; everything in it that begins with `loss` is logged.

        A mean over labelled pixels is one over those of all processes.
        """
        self._check_batch(batch)
        self._check_values(batch, batch_idx)
        with over_processes():
            losses = self.compute_loss(batch)
        self._check_finite(losses["loss"], batch, batch_idx)
        for name, value in losses.items():
            if name.startswith("loss"):
                shown, size = name == "loss", len(batch["mask"])
                several = self.trainer.world_size > 1
                self.log(f"train_{name}", value, prog_bar=shown, batch_size=size, sync_dist=several)
        return losses

    def _check_finite(self, loss: Tensor, batch: dict[str, Any], batch_idx: int) -> None:
        if self._looks_at(batch_idx, loss) and not torch.isfinite(loss):
            raise GenSegError(
                f"The loss is {loss.item()} at step {self.global_step} (images "
                f"{', '.join(batch.get('name', ['without names']))}); lower the learning rate, "
                "clip gradients (trainer.gradient_clip_val) or set trainer.precision to 32 or "
                "bf16-mixed."
            )

    def _looks_at(self, batch_idx: int, values: Tensor) -> bool:
        # Looking at values makes the CPU wait for the GPU; there, now and then is enough.
        if values.device.type == "cpu":
            return True
        steps: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return batch_idx % max(1, steps) == 0

    def _check_values(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Refuse images and labels that a loss would choke on, or take for others."""
        mask = batch["mask"]
        if not self._looks_at(batch_idx, mask):
            return
        if mask.dim() != 3 or mask.is_floating_point():
            raise GenSegError(
                f"the mask of a batch is {mask.dtype} of shape {tuple(mask.shape)}, and must be "
                "B x H x W, whole numbers: let the data set give one class a pixel."
            )
        wrong = mask[(mask != self.ignore_index) & ((mask < 0) | (mask >= self.num_classes))]
        if wrong.numel():
            raise GenSegError(
                f"the mask of a batch holds labels from {int(wrong.min())} to {int(wrong.max())}, "
                f"and there are {self.num_classes} classes: correct the labels, num_classes, or "
                f"ignore_index ({self.ignore_index})."
            )
        if batch_idx == 0:
            unit_image(batch["image"], "the image of a batch")

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Predict and score against `mask`; the predictions are returned for callbacks."""
        self._check_batch(batch)
        self._check_values(batch, batch_idx)
        return self._score(self.maps_at_labels(batch), batch, self.val_metrics)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """As `validation_step`."""
        self._check_batch(batch)
        return self._score(self.maps_at_labels(batch), batch, self.test_metrics)

    def _check_batch(self, batch: object) -> None:
        """Refuse batches of other forms, as loaders of one's own may have."""
        if isinstance(batch, Mapping):
            missing = [key for key in self.batch_keys if key not in batch]
            told = f"has no {', '.join(missing)}" if missing else ""
        else:
            told = f"is {type(batch).__name__}"
        if told:
            raise GenSegError(
                f"a batch {told}, and {type(self).__name__} needs a dictionary with "
                f"{', '.join(self.batch_keys)}: let the data set give such samples, or call "
                "compute_loss from a module of your own."
            )

    def _score(
        self, maps: dict[str, Tensor], batch: dict[str, Any], metrics: MetricCollection
    ) -> dict[str, Tensor]:
        prediction = self._prediction(maps)
        metrics.update(prediction["mask"], batch["mask"])
        return prediction

    def _prediction(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"mask": maps["scores"].argmax(1)}

    def on_validation_epoch_start(self) -> None:
        """Count anew, in memory of this process (`ddp_spawn`)."""
        self.val_metrics.reset()

    def on_validation_epoch_end(self) -> None:
        """Log `val_mIoU`, `val_pixel_accuracy` and `val_IoU_<class>`."""
        self._log_scores("val", self.val_metrics, self.class_names)

    def on_test_epoch_start(self) -> None:
        """Count anew. What was counted stays after the test, for reports and notebooks to draw."""
        self.test_metrics.reset()

    def on_test_epoch_end(self) -> None:
        """Log `test_mIoU`, `test_pixel_accuracy` and `test_IoU_<class>`."""
        self._log_scores("test", self.test_metrics, self.class_names)

    def _log_scores(
        self, prefix: str, metrics: MetricCollection, names: Sequence[str] | None
    ) -> None:
        scores = named_scores(metrics.compute(), names)
        metrics.reset()
        for name, value in scores.items():
            # Equal in all processes already; `sync_dist` spares a warning per class.
            self.log(f"{prefix}_{name}", value, prog_bar=name == "mIoU", sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Forget where weights came from; remember the number of classes."""
        super().on_save_checkpoint(checkpoint)
        for name in self.sources:
            if name in checkpoint.get("hyper_parameters", {}):
                checkpoint["hyper_parameters"][name] = None
        # Apart from the hyper-parameters, which arguments of `load_from_checkpoint` overwrite.
        checkpoint["num_classes"] = self.num_classes

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that was trained on another number of classes."""
        trainer = self._trainer
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            for key in ("optimizer_states", "lr_schedulers", "loops", "epoch", "global_step"):
                if key not in checkpoint:
                    raise GenSegError(
                        f"the checkpoint has no '{key}': training cannot go on from it (was it "
                        "saved with save_weights_only?). Give another; test and predict take it."
                    )
            states = checkpoint["optimizer_states"]
            whole = all("state" in one and one.get("param_groups") for one in states)
            if "fit_loop" not in checkpoint["loops"] or not whole:
                raise GenSegError(
                    "the checkpoint's state of the training is not as a Trainer writes it: "
                    "training cannot go on from it. Give another; test and predict take it."
                )
        super().on_load_checkpoint(checkpoint)
        theirs = checkpoint.get("num_classes", self.num_classes)
        if theirs != self.num_classes:
            raise GenSegError(
                f"The checkpoint was trained on {theirs} classes and the data have "
                f"{self.num_classes}; give it data with the classes it was trained on, or train "
                "anew."
            )
        names = checkpoint.get("hyper_parameters", {}).get("class_names")
        if names and self.class_names and list(names) != list(self.class_names):
            rank_zero_warn(
                f"the checkpoint was trained on the classes {', '.join(names)} and the data have "
                f"{', '.join(self.class_names)}: classes are compared by their numbers."
            )


def check_training(
    accumulate_grad_batches: int,
    check_val_every_n_epoch: int | None,
    gradient_clip_val: float | None,
    val_check_interval: float | None,
) -> None:
    """Refuse arguments of a Trainer that it would divide by, or take for something else."""
    check_arguments(
        check_training,
        locals(),
        accumulate_grad_batches="[1, inf)",
        check_val_every_n_epoch="[1, inf)",
        gradient_clip_val="[0, inf)",
        val_check_interval="(0, inf)",
    )
