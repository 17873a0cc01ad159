"""GMMSeg: generative segmentation with Gaussian mixtures of dense features."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_genseg.errors import GenSegError
from lightning_genseg.methods.base import IMAGENET_MEAN, IMAGENET_STD, SegmentationModule
from lightning_genseg.methods.gmmseg.head import (
    GMMHead,
    LabelReduction,
    LogitNorm,
    MemoryDtype,
    MemoryFilter,
    MemoryKind,
    TrainMixture,
)
from lightning_genseg.mixtures.em import Assignment
from lightning_genseg.mixtures.gaussian import Covariance, Mixture
from lightning_genseg.mixtures.sinkhorn import Processes
from lightning_genseg.networks.features import PixelFeatures, feature_channels
from lightning_genseg.networks.weights import load_weights
from lightning_genseg.ops.views import InferenceOptions
from lightning_genseg.uncertainty.scores import AnomalyName


class GMMSeg(SegmentationModule):
    """Any segmentation network with one Gaussian mixture per class instead of softmax.

    GMMSeg: Gaussian Mixture based Generative Semantic Segmentation Models, Liang, Wang, Miao and
    Yang, NeurIPS 2022. The network learns by cross-entropy, the mixtures by Sinkhorn EM at the end
    of each training batch. `maps` also gives the anomaly score -max_c log p(x|c): what the model
    has never seen is improbable under every class.

    Differs from the authors' code in what enters the memory (`memory_filter`) and in not needing
    several processes.

    Args:
        num_classes: C.
        encoder: any encoder of segmentation_models_pytorch; `tu-<name>` for one of timm.
        decoder: `deeplabv3plus`, `segformer`, `fpn`, ...: see `PixelFeatures`.
        encoder_weights: `imagenet` (downloads), the path of a state dict, or `None`.
        network_options: further arguments of the network, such as `decoder_channels`.
        features: your own network instead: B x 3 x H x W to B x F x h x w.
        components: see `GMMHead`, also for the arguments that follow.
        embedding_dim: see there.
        normalize_features: see there.
        covariance: see there.
        mixture: see there.
        logit_norm: see there.
        logit_scale: see there.
        component_loss_weight: see there.
        assignment: see there.
        sinkhorn_epsilon: see there.
        sinkhorn_iterations: see there.
        em_loops: see there.
        em_interval: EM every so many batches (paper 1, code 5); the memory is fed at every batch.
        mean_momentum: see `GMMHead`, also for the arguments that follow.
        variance_momentum: see there.
        variance_floor: see there.
        memory: see there.
        memory_size: see there.
        memory_dtype: see there.
        memory_filter: see there.
        samples_per_component: see there.
        train_mixture: `em` (the method); `gradient` (Table 4's discriminative GMM); `posthoc`
            (Table 5's mixture fitted after softmax training): the network is frozen and only EM
            runs. Then `embedding_dim` is `None`, and the network comes from `extractor` or
            `features`.
        extractor: checkpoint of a `SoftmaxSegmenter` or `GMMSeg` with the same network, whose
            features training starts from.
        label_reduction: see `GMMHead`; `labelled` for points and scribbles.
        ignore_index: see `SegmentationModule`, also for the arguments that follow.
        class_names: see there.
        mean: see there.
        std: see there.
        inference: see there.
        optimizer: see there.
        lr_scheduler: see there.
        head_lr_factor: see there.
        decay_norms: see there.
        anomaly_score: see there.

    Example:
        >>> model = GMMSeg(num_classes=3, encoder="tu-test_resnet", decoder="fpn", memory_size=100)
        >>> {name: tuple(x.shape) for name, x in model.maps(torch.rand(1, 3, 50, 70)).items()}
        {'scores': (1, 3, 50, 70), 'anomaly': (1, 1, 50, 70)}
    """

    own_anomaly_score = "density"

    def __init__(
        self,
        num_classes: int,
        encoder: str = "resnet50",
        decoder: str = "deeplabv3plus",
        encoder_weights: str | Path | None = None,
        network_options: dict[str, Any] | None = None,
        features: nn.Module | None = None,
        components: int = 5,
        embedding_dim: int | None = 64,
        normalize_features: bool = True,
        covariance: Covariance = "diagonal",
        mixture: Mixture = "max",
        logit_norm: LogitNorm = "layernorm",
        logit_scale: float = 1.0,
        component_loss_weight: float = 0.01,
        assignment: Assignment = "sinkhorn",
        sinkhorn_epsilon: float = 0.05,
        sinkhorn_iterations: int = 3,
        em_loops: int = 1,
        em_interval: int = 5,
        mean_momentum: float = 0.999,
        variance_momentum: float = 0.0,
        variance_floor: float = 1e-2,
        memory: MemoryKind = "ring",
        memory_size: int = 32_000,
        memory_dtype: MemoryDtype = "float32",
        memory_filter: MemoryFilter = "labelled",
        samples_per_component: int = 100,
        train_mixture: TrainMixture = "em",
        extractor: Path | None = None,
        label_reduction: LabelReduction = "nearest",
        ignore_index: int = 255,
        class_names: list[str] | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        inference: InferenceOptions | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        head_lr_factor: float = 1.0,
        decay_norms: bool = True,
        anomaly_score: AnomalyName | None = None,
    ) -> None:
        super().__init__(
            num_classes,
            ignore_index,
            class_names,
            mean,
            std,
            inference,
            optimizer,
            lr_scheduler,
            head_lr_factor,
            decay_norms,
            anomaly_score,
        )
        if em_interval < 1:
            raise GenSegError(f"em_interval is {em_interval}; it must be at least 1.")
        if train_mixture == "posthoc" and embedding_dim is not None:
            raise GenSegError(
                "train_mixture='posthoc' fits the features as they are, and nothing would train a "
                f"projection to {embedding_dim} dimensions; set embedding_dim to null."
            )
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", "features"])
        self.em_interval, self.train_mixture = em_interval, train_mixture
        self.has_trained_features = features is not None or extractor is not None
        self.features = features or PixelFeatures(
            encoder, decoder, encoder_weights, num_classes, network_options
        )
        if extractor is not None:
            load_weights(self.features, extractor, prefix="features.")
        self.head = GMMHead(
            feature_channels(self.features),
            num_classes,
            components,
            embedding_dim,
            normalize_features,
            covariance,
            mixture,
            logit_norm,
            logit_scale,
            component_loss_weight,
            assignment,
            sinkhorn_epsilon,
            sinkhorn_iterations,
            em_loops,
            mean_momentum,
            variance_momentum,
            variance_floor,
            memory,
            memory_size,
            memory_dtype,
            memory_filter,
            samples_per_component,
            train_mixture,
            label_reduction,
            ignore_index,
        )
        if train_mixture == "posthoc":
            self.requires_grad_(False)
            self.features.eval()
            # Lightning counts steps by an optimiser, and DDP and the gradient scaler want a
            # gradient.
            self.nothing = nn.Parameter(torch.zeros(()))

    def outputs(self, image: Tensor) -> dict[str, Tensor]:
        """`logits`, `features` (the embedding) and `log_density` log p(x|c): see the base."""
        embedding = self.head.embed(self.extract(image)[0])
        logits, density = self.head.class_maps(embedding)
        return {"logits": logits, "features": embedding, "log_density": density}

    def compute_loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`loss`, its parts, and the `embedding` that `update_mixture` takes: see `GMMHead`."""
        features, auxiliary = self.extract(batch["image"])
        losses = self.head.compute_loss(features, self.cover(batch["mask"], features))
        return self.add_auxiliary_loss(losses, auxiliary, batch["mask"])

    def update_mixture(
        self,
        embedding: Tensor,
        mask: Tensor,
        processes: Processes | None = None,
        remember_only: bool = False,
    ) -> None:
        """EM on a batch; a Trainer has it called, your own loop calls it: see `GMMHead`."""
        mask = self.cover(mask, embedding)
        self.head.update_mixture(embedding, mask, processes, remember_only)

    # --- Lightning ---------------------------------------------------------------------------

    def configure_callbacks(self) -> list[Callback]:
        """EM at the end of every training batch, on all processes together."""
        return [_EM()]

    def on_fit_start(self) -> None:
        """A mixture of random features would look like a result."""
        if self.train_mixture == "posthoc" and not (
            self.has_trained_features or self.trainer.ckpt_path
        ):
            raise GenSegError(
                "train_mixture='posthoc' needs a trained network; give the checkpoint of a softmax "
                "run as model.extractor."
            )

    def train(self, mode: bool = True) -> "GMMSeg":
        """Set the mode; a post-hoc mixture's network stays in evaluation mode."""
        super().train(mode)
        if self.train_mixture == "posthoc":
            self.features.eval()
        return self

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """As in the base; a post-hoc mixture has nothing to descend."""
        losses = super().training_step(batch, batch_idx)
        if self.train_mixture == "posthoc":
            losses["loss"] = losses["loss"] + 0 * self.nothing
        return losses

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep EM's memory with the optimiser's state: weights alone do not carry it."""
        super().on_save_checkpoint(checkpoint)
        if self.head.memory is not None and "optimizer_states" in checkpoint:
            checkpoint["mixture_memory"] = self.head.memory.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the memory up again, if the checkpoint has one."""
        super().on_load_checkpoint(checkpoint)
        self.has_trained_features = True
        if self.head.memory is not None and "mixture_memory" in checkpoint:
            self.head.memory.load_state_dict(checkpoint["mixture_memory"])


class _EM(Callback):
    """Calls `update_mixture` at the end of a batch.

    A callback, because `ModelCheckpoint` runs after the other callbacks but before the module's own
    `on_train_batch_end`, and would save the mixture of the batch before.
    """

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
    ) -> None:
        """EM with the batch's embedding; batches are counted over epochs, which may be short."""
        assert isinstance(pl_module, GMMSeg)
        if pl_module.train_mixture == "gradient":
            return

        def gather(tensor: Tensor) -> Tensor:
            gathered = pl_module.all_gather(tensor)
            assert isinstance(gathered, Tensor)
            return gathered

        pl_module.update_mixture(
            outputs["embedding"],
            batch["mask"],
            Processes(gather, trainer.global_rank) if trainer.world_size > 1 else None,
            remember_only=(trainer.fit_loop.total_batch_idx + 1) % pl_module.em_interval != 0,
        )
