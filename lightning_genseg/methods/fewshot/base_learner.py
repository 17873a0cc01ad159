"""The base learner: what the few-shot methods know before they see an episode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_genseg.arguments import check_arguments
from lightning_genseg.methods.base import SegmentationModule
from lightning_genseg.methods.checkpoints import read_checkpoint
from lightning_genseg.methods.fewshot.networks import EncoderStages, OutputStride, PyramidPooling
from lightning_genseg.methods.fewshot.published import load_published
from lightning_genseg.networks.losses import pixel_cross_entropy
from lightning_genseg.networks.weights import load_weights
from lightning_genseg.ops.resize import resize_aligned


class BaseLearner(SegmentationModule):
    """PSPNet on the base classes of a fold: stage one of CGMGM and BAM, which freeze it.

    Learning What Not to Segment (BAM), Lang et al., CVPR 2022. Class 0 is the background, to which
    the novel classes belong here. It also logs `val_mIoU_base`, the mean without background by
    which BAM chooses.

    - As the authors: the sizes of the pyramid, cross-entropy over labelled pixels without auxiliary
      head, logits enlarged with aligned corners; by option their encoder (`tu-resnet50s`,
      `vgg16_bn`) and their checkpoints (`published`).
    - As the paper: it has PSPNet, and nothing else that could differ.
    - Ours: by default a ResNet-50 with a stem of one convolution; `imagenet` weights are those of
      smp or timm.

    Args:
        num_classes: C, the base classes and the background.
        encoder: any encoder of segmentation_models_pytorch; `tu-<name>` for one of timm.
        encoder_weights: `imagenet` (downloads), the path of a state dict, or `None`.
        output_stride: of the encoder; VGG always has 16.
        dropout: of whole channels before the classifier.
        published: checkpoint of BAM's authors, with `encoder` tu-resnet50s or vgg16_bn.

    Example:
        >>> import torch
        >>> model = BaseLearner(num_classes=3, encoder="tu-test_resnet").eval()
        >>> model(torch.rand(1, 3, 50, 70)).shape
        torch.Size([1, 3, 50, 70])
    """

    features: EncoderStages
    sources = (*SegmentationModule.sources, "published")

    def __init__(
        self,
        num_classes: int,
        encoder: str = "resnet50",
        encoder_weights: str | Path | None = None,
        output_stride: OutputStride = 8,
        dropout: float = 0.1,
        published: Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, **kwargs)
        check_arguments(BaseLearner.__init__, locals(), dropout="[0, 1)")
        self.features = EncoderStages(encoder, encoder_weights, output_stride)
        self.pyramid = PyramidPooling(self.features.channels[2])
        self.classifier = nn.Sequential(
            nn.Dropout2d(dropout), nn.Conv2d(self.pyramid.out_channels, num_classes, 1)
        )
        self.needs_training = published is None
        if published is not None:
            load_published(self, published)

    def outputs(self, image: Tensor) -> dict[str, Tensor]:
        """`logits` and `features`, as `SegmentationModule` asks."""
        features = self.pyramid(self.features(self.normalize(image)).high)
        return {"logits": self.classifier(features), "features": features}

    def compute_loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Pixel cross-entropy."""
        scores = self.to_image(self.outputs(batch["image"])["logits"], batch["mask"])
        return {"loss": pixel_cross_entropy(scores, batch["mask"], self.ignore_index)}

    def to_image(self, scores: Tensor, image: Tensor) -> Tensor:
        """Upsample bilinearly with aligned corners, which is exact for sides of 8 n + 1 pixels."""
        return resize_aligned(scores.float(), image.shape[-2:])

    def _log_scores(
        self, prefix: str, metrics: MetricCollection, names: Sequence[str] | None
    ) -> None:
        base = metrics.compute()["IoU"][1:].nanmean()
        self.log(f"{prefix}_mIoU_base", base, sync_dist=True)
        super()._log_scores(prefix, metrics, names)


def load_base_learner(path: str | Path) -> BaseLearner:
    """A trained base learner from its checkpoint, in evaluation mode.

    Raises:
        MissingFileError: there is no such file.
        GenSegError: it is no checkpoint of a `BaseLearner`.
    """

    def fits(content: Mapping[str, Any]) -> bool:
        return (
            any(key.startswith("pyramid.") for key in content["state_dict"])
            and "encoder" in content["hyper_parameters"]
            and "num_classes" in content
        )

    checkpoint = read_checkpoint(path, "base_learner", "BaseLearner", fits)
    saved = checkpoint["hyper_parameters"]
    names = ("encoder", "output_stride", "class_names", "mean", "std")
    arguments = {name: saved[name] for name in names if name in saved}
    model = BaseLearner(checkpoint["num_classes"], **arguments)
    load_weights(model, path, prefix="")
    return model.eval()
