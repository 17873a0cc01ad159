"""GMMSeg: generative segmentation with Gaussian mixtures of dense features."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_genseg.arguments import as_options
from lightning_genseg.errors import GenSegError
from lightning_genseg.methods.gmmseg.head import GMMHead
from lightning_genseg.methods.gmmseg.options import EMOptions, LogitNorm, MixtureOptions
from lightning_genseg.methods.gmmseg.steps import StepCallback
from lightning_genseg.methods.pixel import PixelModule
from lightning_genseg.metrics import segmentation_metrics
from lightning_genseg.metrics.segmentation import score_keys
from lightning_genseg.networks.features import PixelFeatures, feature_channels
from lightning_genseg.networks.weights import load_weights
from lightning_genseg.ops.inference_options import input_size
from lightning_genseg.ops.processes import Processes
from lightning_genseg.ops.resize import resize_labels, resize_maps
from lightning_genseg.ops.views import evaluation_mode, unit_image
from lightning_genseg.uncertainty.scores import AnomalyScores


class GMMSeg(PixelModule):
    """Any segmentation network with one Gaussian mixture per class instead of softmax.

    GMMSeg: Gaussian Mixture based Generative Semantic Segmentation Models, Liang, Wang, Miao and
    Yang, NeurIPS 2022. The network learns by cross-entropy, the mixtures by Sinkhorn EM at the end
    of each training batch. `maps` also gives the anomaly score -max_c log p(x|c): what the model
    has never seen is improbable under every class.

    - As the authors' code: the defaults but for what follows; with `em.memory` ring,
      `em.memory_filter` correct, `em.memory_start` random, `em.label_reduction` corner,
      `em.samples_per_component` 20 and `avg_non_ignore` false these too. Over six steps their
      numbers agree to 5e-6.
    - As the paper: all labelled pixels may enter the memory, though not 100 of each class and image
      but at most 100 for each component and update (`em.samples_per_component`). By option:
      `em.memory` ring, `em.interval` 1, `em.variance_momentum` 0.999, `logit_norm` none,
      `component_loss_weight` 0.
    - Ours by default: a memory of moments that starts empty, the labels in the middle of cells, the
      mean over labelled pixels.
    - Ours always: variances start at 1/D and the floor (code: 1); densities have the mixtures'
      weights, a constant 1/M; EM runs at the end of a training batch, not in `forward`; all
      classes at once, also one that only batches between two M-steps had, where it is new; one
      process is enough.

    Args:
        num_classes: C.
        mixture: the mixtures and their space.
        em: how they are fitted.
        logit_norm: `layernorm` over the C log-densities before the cross-entropy (code), or `none`
            (paper). Anomaly scores never pass through it.
        logit_scale: initial gain of that LayerNorm (code 1); see `GMMHead` for few classes.
        component_loss_weight: of the cross-entropy over all C x M components, towards the pixel's
            assigned one; in the code, not in the paper; 0 switches it off.
        dropout: of whole channels before the projection, while training (code); a post-hoc mixture
            has none.
        avg_non_ignore: mean of the cross-entropy over labelled pixels, or over all of them (code).
        extractor: checkpoint of a `SoftmaxSegmenter` or `GMMSeg` with the same network, whose
            features training starts from.

    Raises:
        GenSegError: arguments that are out of range or exclude each other.

    Example:
        >>> em = EMOptions(memory_size=100)
        >>> model = GMMSeg(3, encoder="tu-test_resnet", decoder="fpn", em=em)
        >>> {name: tuple(x.shape) for name, x in model.maps(torch.rand(1, 3, 50, 70)).items()}
        {'scores': (1, 3, 50, 70), 'anomaly': (1, 1, 50, 70)}
    """

    own_anomaly_score = "density"
    sources = (*PixelModule.sources, "extractor")

    def __init__(
        self,
        num_classes: int,
        mixture: MixtureOptions = MixtureOptions(),
        em: EMOptions = EMOptions(),
        logit_norm: LogitNorm = "layernorm",
        logit_scale: float = 1.0,
        component_loss_weight: float = 0.01,
        dropout: float = 0.1,
        avg_non_ignore: bool = True,
        extractor: Path | None = None,
        **kwargs: Any,
    ) -> None:
        mixture, em = as_options(MixtureOptions, mixture), as_options(EMOptions, em)
        posthoc = em.train == "posthoc"
        if posthoc and mixture.embedding_dim is not None:
            raise GenSegError(
                "em.train='posthoc' fits the features as they are, and nothing would train a "
                f"projection to {mixture.embedding_dim} dimensions; set mixture.embedding_dim to "
                "null."
            )
        super().__init__(num_classes, **kwargs)
        self.em, self.posthoc = em, posthoc
        own = kwargs.get("features") is not None
        # Of a network by name the encoder alone comes with weights.
        whole = isinstance(self.features, PixelFeatures) and not [
            *self.features.decoder.parameters()
        ]
        pretrained = whole and kwargs.get("encoder_weights") is not None
        self.has_trained_features = own or extractor is not None or pretrained
        if extractor is not None:
            load_weights(self.features, extractor, prefix="features.")
        self.head = GMMHead(
            in_channels=feature_channels(self.features),
            num_classes=num_classes,
            mixture=mixture,
            em=em,
            logit_norm=logit_norm,
            logit_scale=logit_scale,
            component_loss_weight=component_loss_weight,
            dropout=0.0 if posthoc else dropout,
            avg_non_ignore=avg_non_ignore,
            ignore_index=self.ignore_index,
        )
        if self.posthoc:
            self.requires_grad_(False)
            self.features.eval()
            # Lightning counts steps by an optimiser; DDP and the gradient scaler want a gradient.
            self.nothing = nn.Parameter(torch.zeros(()))

    def undeployable(self) -> str | None:
        """A full covariance is whitened by operations that ONNX does not have."""
        if self.head.options.covariance == "full":
            return "a graph holds no mixture.covariance full: train with diagonal."
        return super().undeployable()

    def outputs(self, image: Tensor) -> dict[str, Tensor]:
        """`logits`, `features` (the embedding) and `log_density`, as `SegmentationModule` asks."""
        embedding = self.head.embed(self.extract(image)[0])
        logits, density = self.head.class_maps(embedding)
        return {"logits": logits, "features": embedding, "log_density": density}

    def compute_loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`loss`, its parts, and what `update_mixture` takes: see `GMMHead`."""
        features, auxiliary = self.extract(batch["image"])
        losses = self.head.compute_loss(features, self.cover(batch["mask"], features))
        return self.add_auxiliary_loss(losses, auxiliary, batch["mask"])

    def update_mixture(
        self,
        embedding: Tensor,
        mask: Tensor,
        assignment: Tensor | None = None,
        processes: Processes | None = None,
        remember_only: bool = False,
        accumulating: bool = False,
    ) -> None:
        """EM on a batch; a Trainer has it called, your own loop calls it: see `GMMHead`."""
        mask = self.cover(mask, embedding)
        self.head.update_mixture(
            embedding, mask, assignment, processes, remember_only, accumulating
        )

    @torch.no_grad()
    def add_class(
        self,
        images: Sequence[Tensor],
        masks: Sequence[Tensor],
        name: str,
        seed: int = 0,
        shrinkage: float = 0.5,
    ) -> None:
        """Learn one more class from a few images: its mixture is fitted, nothing else changes.

        Not in the paper. The features were trained without the class, so that it is told apart
        from the others only as far as these differ. Thresholds of `genseg calibrate` are dropped.

        Args:
            images: 3 x H x W each, in [0, 1] or uint8, of any sizes; seen at those of `inference`.
            masks: H x W each: 1 where the new class is; anything else does not count.
            name: of the new class, which gets the number C.
            seed: of the start of EM.
            shrinkage: share, in [0, 1], of the other classes' mean covariance in that of the new
                one. With 0 a class of few images claims too many pixels of classes like it.

        Raises:
            GenSegError: no mask for each image, no pixel of the class, a name that is taken, or a
                decoder with scores of its own (`ocrnet`, `mla`).
        """
        if isinstance(self.features, PixelFeatures) and self.features.predicts_classes:
            raise GenSegError(
                f"the network {self.features.name} predicts classes itself and cannot learn one "
                "more: train with a decoder without auxiliary scores."
            )
        names = self.all_class_names
        if not name.strip():
            raise GenSegError("name is empty: give the new class one.")
        if name in names:
            raise GenSegError(f"name is '{name}', which is a class already: give another one.")
        score_keys([*names, name])
        if self.num_classes == self.ignore_index:
            raise GenSegError(
                f"the new class would have the number {self.ignore_index}, which is ignore_index."
            )
        if not images or len(images) != len(masks):
            raise GenSegError(
                f"add_class got {len(images)} images and {len(masks)} masks: give one mask for "
                "each image, and at least one."
            )
        found = []
        with evaluation_mode(self):
            for image, mask in zip(images, masks, strict=True):
                if image.ndim != 3 or len(image) != 3 or image.shape[1:] != mask.shape:
                    raise GenSegError(
                        f"an image is {tuple(image.shape)} and its mask {tuple(mask.shape)}: give "
                        "3 x H x W and H x W."
                    )
                labels = torch.where(mask == 1, 0, self.ignore_index)[None]
                image = unit_image(image, "an image")[None].to(self.device)
                # The size that predictions see.
                size = input_size((labels.shape[1], labels.shape[2]), self.inference or {})
                features = self.outputs(resize_maps(image, size))["features"]
                labels = self.cover(resize_labels(labels, size), features)
                own = self.head.labels(labels.to(self.device), features) == 0
                found.append(rearrange(features, "b d h w -> (b h w) d")[own])
        pixels = torch.cat(found)
        if not len(pixels):
            raise GenSegError(
                f"no mask marks '{name}' with 1 in an area that is left at the features' size: "
                "mark the class with 1, or give larger images."
            )
        self.head.add_class(pixels, seed, shrinkage)
        self.anomaly = AnomalyScores()
        self.num_classes += 1
        self.class_names = [*names, name]
        self.hparams.update(num_classes=self.num_classes, class_names=self.class_names)
        self.val_metrics = segmentation_metrics(self.num_classes, self.ignore_index).to(self.device)
        self.test_metrics = self.val_metrics.clone()

    # --- Lightning ---------------------------------------------------------------------------

    def configure_callbacks(self) -> list[Callback]:
        """EM at the end of every training batch, on all processes together."""
        return [*super().configure_callbacks(), _EM()]

    def on_fit_start(self) -> None:
        """A mixture of random features would look like a result."""
        super().on_fit_start()
        if self.posthoc and not (self.has_trained_features or self.trainer.ckpt_path):
            raise GenSegError(
                "em.train='posthoc' needs a trained network; give the checkpoint of a softmax "
                "run as model.extractor, or encoder_weights with decoder 'hypercolumns'."
            )

    def train(self, mode: bool = True) -> "GMMSeg":
        """Set the mode; a post-hoc mixture's network stays in evaluation mode."""
        super().train(mode)
        if self.posthoc:
            self.features.eval()
        return self

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """As in the base; a post-hoc mixture has nothing to descend."""
        losses = super().training_step(batch, batch_idx)
        if self.posthoc:
            losses["loss"] = losses["loss"] + 0 * self.nothing
        return losses

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep EM's memory with the optimiser's state: weights alone do not carry it."""
        super().on_save_checkpoint(checkpoint)
        if self.head.memory is not None and "optimizer_states" in checkpoint:
            checkpoint["mixture_memory"] = self.head.memory_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the memory, if the checkpoint has one; tests and predictions do without."""
        super().on_load_checkpoint(checkpoint)
        self.has_trained_features = True
        if self.head.memory is not None and "mixture_memory" in checkpoint:
            try:
                self.head.load_memory_state(checkpoint["mixture_memory"])
            except GenSegError:
                if self._trainer is None or self._trainer.state.fn == "fit":
                    raise


class _EM(StepCallback):
    """Calls `update_mixture` at the end of a batch.

    A callback, because `ModelCheckpoint` runs after the other callbacks but before the module's own
    `on_train_batch_end`, and would save the mixture of the batch before.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what a run before has left, before a checkpoint brings its own."""
        assert isinstance(pl_module, GMMSeg)
        if stage == "fit":
            pl_module.head.forget_batches()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
    ) -> None:
        """EM with the batch's embedding, once a step of the optimiser; the rest is remembered."""
        assert isinstance(pl_module, GMMSeg)
        if pl_module.em.train == "gradient":
            return
        stepped = self.took_step(trainer)
        due = self.is_due(trainer, pl_module.em.interval, to_the_end=pl_module.posthoc)
        pl_module.update_mixture(
            outputs["embedding"],
            batch["mask"],
            outputs["assignment"],
            remember_only=not due,
            accumulating=not stepped,
        )
