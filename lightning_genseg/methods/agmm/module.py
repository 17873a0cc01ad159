"""AGMM: learning from points and scribbles, which Gaussians around the labelled pixels spread."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_genseg.arguments import as_options, check_arguments
from lightning_genseg.errors import GenSegError
from lightning_genseg.methods.agmm.gaussian_map import (
    centre_distance,
    centre_similarity,
    chosen,
    class_centres,
    everywhere,
    gaussian_map,
    gaussian_variance,
    labels_of,
)
from lightning_genseg.methods.agmm.losses import absent_class_loss, class_agreement_loss
from lightning_genseg.methods.agmm.options import GaussianOptions
from lightning_genseg.methods.softmax import SoftmaxSegmenter
from lightning_genseg.networks.losses import pixel_cross_entropy
from lightning_genseg.ops.resize import resize_maps
from lightning_genseg.ops.views import evaluation_mode

Preset = Literal["code", "paper"]
Variance = Literal["fixed", "predicted", "uniform"]
ContrastCentre = Literal["mean", "sum"]


class AGMM(SoftmaxSegmenter):
    """The softmax segmenter, trained on a few labelled pixels and the Gaussians around them.

    Sparsely Annotated Semantic Segmentation with Adaptive Gaussian Mixtures, Wu, Zhong, Fang, He,
    Liu, Ma and Chen, CVPR 2023. In each training image a class has the mean feature of its labelled
    pixels as its centre mu_i; with d_i, the mean absolute difference of a pixel's feature to it,
    the map G_i = exp(-d_i^2 / 2 sigma_i^2) says how much like class i every pixel is. G and the
    prediction learn from each other at all pixels that are not padding. It has no parameters and is
    not needed after training: the checkpoint predicts like a `SoftmaxSegmenter`.

    - As the authors' code: the defaults, with `gaussians` probability image, padding blurred and
      empty_images counted, `align_corners`, decoder `deeplabv3plus_full` and encoder
      `tu-resnet101s` or `tu-resnet50s`, and `data.sparse.zoom`. So do the recipes for its tables.
      `preset: code` is 2 sigma_i^2 = 1 and a contrast between the sums of the centres over the
      images of a batch, which weakens as the batch grows.
    - As the paper, which we know by its poster: `preset: paper`. sigma_i^2 is the mean of d_i^2,
      weighted by the predicted probability of class i, as in lines that the code has commented out,
      over all pixels of the image (poster: the unlabelled ones); the contrast is between mean
      centres. `gaussian_weight`, `image_class_weight` and the contrast's form are the code's alone.
    - Ours: the defaults of `gaussians`; a batch without labels has a loss of 0, not NaN; no
      dilation by 4, 8 and 16 in the last stage (code, on Cityscapes); scores are averaged over a
      sliding window raw (code: after two softmaxes), and counted over all processes. With a
      Trainer the losses are means over the pixels of all processes as well, but the contrast is
      each process's own, as everything is in the code.

    Args:
        num_classes: C.
        preset: what the next two are when left out.
        variance: 2 sigma_i^2 = 1 (`fixed`), or the image's mean of d_i^2, weighted by the
            `predicted` probabilities or not at all (`uniform`); without gradient.
        contrast_centre: `mean` or `sum` over the images of a batch that have the class.
        gaussians: details of the maps.
        self_weight: of the agreement of prediction and G, over labelled and unlabelled pixels.
        gaussian_weight: of the agreement of G with the labels.
        contrast_weight: of the similarity between the centres of different classes.
        image_class_weight: of -log(1 - p_i) for the classes i without a label anywhere in the
            image. It takes them for absent: 0 where annotators do not mark every class they see.
        detach_gaussian: let G teach the prediction only, as a fixed target, and not learn from it.

    Example:
        >>> model = AGMM(num_classes=3, encoder="tu-test_resnet", decoder="fpn")
        >>> mask = torch.full((2, 48, 64), 255)
        >>> mask[:, 10, 10], mask[:, 30, 40] = 0, 2  # two labelled pixels an image
        >>> tags = torch.tensor([[True, False, True]] * 2)
        >>> batch = {"image": torch.rand(2, 3, 48, 64), "mask": mask, "unlabelled": mask == 255}
        >>> sorted(model.compute_loss({**batch, "image_classes": tags}))
        ['loss', 'loss_ce', 'loss_contrast', 'loss_gaussian', 'loss_image_class', 'loss_self']
    """

    def __init__(
        self,
        num_classes: int,
        preset: Preset = "code",
        variance: Variance | None = None,
        contrast_centre: ContrastCentre | None = None,
        gaussians: GaussianOptions = GaussianOptions(),
        self_weight: float = 1.0,
        gaussian_weight: float = 1.0,
        contrast_weight: float = 1.0,
        image_class_weight: float = 1.0,
        detach_gaussian: bool = False,
        **kwargs: Any,
    ) -> None:
        weights = {
            "self": self_weight,
            "gaussian": gaussian_weight,
            "contrast": contrast_weight,
            "image_class": image_class_weight,
        }
        ranges = {f"{term}_weight": "[0, inf)" for term in weights}
        check_arguments(AGMM.__init__, locals(), **ranges)
        super().__init__(num_classes, **kwargs)
        self.gaussians = as_options(GaussianOptions, gaussians)
        self.weights = weights
        adaptive = preset == "paper"
        self.variance: Variance = variance or ("predicted" if adaptive else "fixed")
        self.contrast_centre: ContrastCentre = contrast_centre or ("mean" if adaptive else "sum")
        self.detach_gaussian = detach_gaussian

    def compute_loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`loss`, and `loss_<term>` for the cross-entropy and every term whose weight is not 0.

        Args:
            batch: `image` B x 3 x H x W in [0, 1]; `mask` B x H x W int64, a class at labelled
                pixels and `ignore_index` elsewhere; `unlabelled` B x H x W bool, True at the pixels
                of the image that have no label and False at labelled ones and padding;
                `image_classes` B x C bool, the classes labelled anywhere in the image, also outside
                the crop.

        Raises:
            GenSegError: the batch has no `unlabelled` or `image_classes`, or they are not of this
                type and shape.
        """
        _check_sparse(batch, self.num_classes, self.weights["image_class"] > 0)
        features, auxiliary = self.extract(batch["image"])
        logits = self.classifier(features)
        mask, unlabelled = batch["mask"], batch["unlabelled"]
        labelled = mask != self.ignore_index
        with torch.autocast(features.device.type, enabled=False):
            scores = self.to_image(logits, mask)
            losses = {"loss_ce": pixel_cross_entropy(scores, mask, self.ignore_index)}
            gaussian, centres, present = self._gaussians(features, logits, mask, unlabelled)
            probability = scores.softmax(1)
            inside = labelled | unlabelled
            if self.weights["self"]:
                losses["loss_self"] = class_agreement_loss(
                    chosen(probability, present),
                    gaussian.detach() if self.detach_gaussian else gaussian,
                    present,
                    self._counted(inside, present),
                )
            if self.weights["gaussian"]:
                labels = labels_of(mask, present).to(gaussian.dtype)
                losses["loss_gaussian"] = class_agreement_loss(gaussian, labels, present, labelled)
            if self.weights["contrast"]:
                images = present.sum(0)
                total = centres.sum(0)
                if self.contrast_centre == "mean":
                    total = total / images.clamp_min(1)[:, None]
                losses["loss_contrast"] = centre_similarity(total, images > 0)
            if self.weights["image_class"]:
                held = batch["image_classes"]
                losses["loss_image_class"] = absent_class_loss(
                    probability, held, self._counted(inside, held)
                )
        loss = losses["loss_ce"]
        for name, weight in self.weights.items():
            if weight:
                loss = loss + weight * losses[f"loss_{name}"]
        return self.add_auxiliary_loss({"loss": loss, **losses}, auxiliary, mask)

    @torch.no_grad()
    def gaussian_map(self, batch: Mapping[str, Any]) -> Tensor:
        """G of a batch with sparse labels (see `compute_loss`): B x C x H x W in [0, 1].

        The map of a class without a labelled pixel in the image is 0.
        """
        _check_sparse(batch, self.num_classes, needs_classes=False)
        with evaluation_mode(self):
            features = self.extract(batch["image"])[0]
            logits = self.classifier(features)
        maps, _, present = self._gaussians(features, logits, batch["mask"], batch["unlabelled"])
        return everywhere(maps, present)

    def _counted(self, inside: Tensor, classes: Tensor) -> Tensor:
        """Pixels of the image (B x H x W) that count, of images with these classes (B x C)."""
        if self.gaussians.empty_images == "counted":
            return inside
        return inside & classes.any(1)[:, None, None]

    def _gaussians(
        self, features: Tensor, logits: Tensor, mask: Tensor, unlabelled: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """G of `chosen` classes, centres (B x C x D), and which classes have one (B x C)."""
        with torch.autocast(features.device.type, enabled=False):
            covered = mask if self.align_corners else self.cover(mask, features)
            centres, present = class_centres(features, covered, self.num_classes)
            distance = centre_distance(features, centres, present)
            valid = self._inside(covered, mask, unlabelled, distance)
            blurred = self.gaussians.padding == "blurred"
            if blurred:
                distance = distance * valid
            variance = None
            if self.variance == "predicted":
                weights = valid * self._probability(logits.detach(), mask, distance)
                variance = gaussian_variance(distance, weights)
            elif self.variance == "uniform":
                # Blurred distances are weighted already; the code weights them twice only above.
                weights = torch.ones_like(valid) if blurred else valid
                variance = gaussian_variance(distance, weights, valid)
            gaussian = gaussian_map(distance, present, variance)
            # The other maps are 0, and would cost as much.
            maps = self._stretch(chosen(gaussian, present)[:, None], mask)[:, 0]
            return maps, centres, present

    def _inside(self, covered: Tensor, mask: Tensor, unlabelled: Tensor, maps: Tensor) -> Tensor:
        """The part of each feature's cell that belongs to the image, B x 1 x h x w."""
        _, rows, columns = (a - b for a, b in zip(covered.shape, mask.shape, strict=True))
        inside = F.pad((mask != self.ignore_index) | unlabelled, (0, columns, 0, rows))
        blurred = self.gaussians.padding == "blurred"
        return F.interpolate(
            inside[:, None].to(maps.dtype), maps.shape[-2:], mode="bilinear" if blurred else "area"
        )

    def _probability(self, logits: Tensor, mask: Tensor, maps: Tensor) -> Tensor:
        """Class probabilities at the size of `maps`."""
        if self.gaussians.probability == "features":
            return logits.to(maps.dtype).softmax(1)
        probability = self.to_image(logits, mask).softmax(1)
        return F.interpolate(probability, maps.shape[-2:], mode="bilinear")

    def _stretch(self, maps: Tensor, mask: Tensor) -> Tensor:
        """Maps at the size of the image; never with aligned corners, also in the code."""
        return (
            resize_maps(maps, mask.shape[-2:]) if self.align_corners else self.to_image(maps, mask)
        )


def _check_sparse(batch: Mapping[str, Any], num_classes: int, needs_classes: bool) -> None:
    wanted: dict[str, Sequence[int]] = {"unlabelled": batch["mask"].shape}
    if needs_classes:
        wanted["image_classes"] = (len(batch["mask"]), num_classes)
    missing = wanted.keys() - batch.keys()
    if missing:
        raise GenSegError(
            "AGMM learns from sparse labels and the batch has no "
            f"{' and no '.join(sorted(missing))}: set data.sparse, for instance --data.sparse "
            "Points --data.sparse.count 3."
        )
    for name, shape in wanted.items():
        value = batch[name]
        if value.dtype != torch.bool or tuple(value.shape) != tuple(shape):
            raise GenSegError(
                f"{name} of the batch is {value.dtype} of shape {tuple(value.shape)} but AGMM "
                f"needs torch.bool of shape {tuple(shape)}: make it as SparseDataset does."
            )
