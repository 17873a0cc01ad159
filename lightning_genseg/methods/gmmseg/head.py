"""GMMSeg's dense generative classifier, for any network that gives a feature map."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lightning_genseg.errors import GenSegError
from lightning_genseg.mixtures.em import Assignment, e_step, m_step
from lightning_genseg.mixtures.gaussian import Covariance, GaussianMixture, Mixture, own_class
from lightning_genseg.mixtures.memory import (
    DecayedMoments,
    FeatureRing,
    Moments,
    batch_moments,
    count_groups,
    gather_features,
    spread_evenly,
    total_over,
)
from lightning_genseg.mixtures.sinkhorn import Processes, segments
from lightning_genseg.networks.losses import pixel_cross_entropy
from lightning_genseg.ops.resize import resize_labels

LogitNorm = Literal["layernorm", "none"]
TrainMixture = Literal["em", "gradient", "posthoc"]
MemoryKind = Literal["ring", "decay"]
MemoryDtype = Literal["float32", "bfloat16", "float16"]
MemoryFilter = Literal["labelled", "correct"]
LabelReduction = Literal["nearest", "labelled"]


class GMMHead(nn.Module):
    """Projection and class mixtures in place of a softmax classifier.

    GMMSeg: Gaussian Mixture based Generative Semantic Segmentation Models, Liang et al., NeurIPS
        2022.
    The extractor and the projection learn by cross-entropy on the class log-densities; the mixture
    learns by (Sinkhorn) EM, in `update_mixture`, never by gradient. Where paper and authors' code
    differ both can be chosen; the defaults follow the code unless said otherwise.

    Args:
        in_channels: F, channels of the feature map.
        num_classes: C.
        components: M, Gaussians per class (paper: 5; authors' code: 8 on ADE20K, 3 on Cityscapes).
        embedding_dim: D; `None` leaves out the projection, and D is F.
        normalize_features: LayerNorm and L2-normalise the embedding, and the means likewise.
        covariance: `diagonal`, or `full` for D <= 64 (the paper restricts it "for efficiency").
        mixture: class density as the largest component (`max`, winner-take-all) or `logsumexp`.
        logit_norm: `layernorm` over the C log-densities before the cross-entropy (code), or `none`
            (paper). Anomaly scores never pass through it.
        logit_scale: initial gain of that LayerNorm (code 1, learned from there). Between C
            standardised numbers the largest gap is C / sqrt(C - 1): 12 for 150 classes, where a
            gain of 1 will do, but 3.5 for 11, where no probability can pass 0.77 until the gain has
            grown; short runs on few classes need more.
        component_loss_weight: of the cross-entropy over all C x M components, towards the pixel's
            assigned one; in the code, not in the paper; 0 switches it off.
        assignment: E-step by `sinkhorn` (Eq. 9) or plain `em` (Eq. 8).
        sinkhorn_epsilon: entropy weight.
        sinkhorn_iterations: rounds.
        em_loops: E- and M-steps per update.
        mean_momentum: share of the old means that stays in an update.
        variance_momentum: likewise of the covariances (code 0, paper 0.999).
        variance_floor: added to every variance.
        memory: `ring` (last features, exact) or `decay` (decayed moments; megabytes, not
            gigabytes).
        memory_size: K, features per component.
        memory_dtype: of the features in the ring.
        memory_filter: which pixels may enter: all `labelled` ones (paper) or those that are
            classified `correct`ly (code; starves rare classes in short runs).
        samples_per_component: at most so many enter per component and update.
        train_mixture: `em`; `gradient` makes the mixture's parameters learn by gradient (the
            paper's discriminative GMM); `posthoc` is `em` for an extractor that does not learn (see
            `GMMSeg`).
        label_reduction: label of a feature for EM, which is smaller than the labels: the `nearest`,
            that at the middle of its cell; or, for sparse labels, which would mostly fall between
            the middles, the most frequent one of the `labelled` pixels in its cell.
        ignore_index: label that does not count.

    Example:
        >>> head = GMMHead(in_channels=16, num_classes=3, embedding_dim=8)
        >>> features, mask = torch.randn(2, 16, 8, 8), torch.randint(3, (2, 32, 32))
        >>> losses = head.compute_loss(features, mask)
        >>> losses["loss"].backward()                          # then the optimiser's step, then:
        >>> head.update_mixture(losses["embedding"], mask)
        >>> head(features).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
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
        mean_momentum: float = 0.999,
        variance_momentum: float = 0.0,
        variance_floor: float = 1e-2,
        memory: MemoryKind = "ring",
        memory_size: int = 32_000,
        memory_dtype: MemoryDtype = "float32",
        memory_filter: MemoryFilter = "labelled",
        samples_per_component: int = 100,
        train_mixture: TrainMixture = "em",
        label_reduction: LabelReduction = "nearest",
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        _check_range("mean_momentum", mean_momentum, 0, 1)
        _check_range("variance_momentum", variance_momentum, 0, 1)
        _check_range("variance_floor", variance_floor, 1e-12, None)
        _check_range("em_loops", em_loops, 1, None)
        _check_range("samples_per_component", samples_per_component, 1, None)
        dim = in_channels if embedding_dim is None else embedding_dim
        if covariance == "full" and dim > 64:
            raise GenSegError(
                f"covariance='full' is for at most 64 dimensions and the embedding has {dim}; "
                "set embedding_dim to 64 or less, or covariance to 'diagonal'."
            )
        self.num_classes, self.components, self.ignore_index = num_classes, components, ignore_index
        self.mixture_kind, self.component_loss_weight = mixture, component_loss_weight
        self.normalize_features, self.train_mixture = normalize_features, train_mixture
        self.assignment, self.em_loops = assignment, em_loops
        self.sinkhorn_epsilon, self.sinkhorn_iterations = sinkhorn_epsilon, sinkhorn_iterations
        self.mean_momentum, self.variance_momentum = mean_momentum, variance_momentum
        self.variance_floor = variance_floor
        self.memory_filter, self.samples_per_component = memory_filter, samples_per_component
        self.label_reduction = label_reduction

        self.projection: nn.Module = nn.Identity()
        if embedding_dim is not None:
            self.projection = nn.Sequential(
                nn.Conv2d(in_channels, dim, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU()
            )
        self.feature_norm = nn.LayerNorm(dim) if normalize_features else nn.Identity()
        self.logit_norm: nn.Module = nn.Identity()
        if logit_norm == "layernorm":
            self.logit_norm = nn.LayerNorm(num_classes)
            nn.init.constant_(self.logit_norm.weight, logit_scale)
        self.mixture = GaussianMixture(
            num_classes,
            components,
            dim,
            covariance,
            unit_means=normalize_features,
            trainable=train_mixture == "gradient",
            variance_floor=variance_floor,
        )
        groups, full = num_classes * components, covariance == "full"
        self.memory: FeatureRing | DecayedMoments | None = None
        if train_mixture != "gradient":
            self.memory = (
                FeatureRing(groups, dim, memory_size, full, getattr(torch, memory_dtype))
                if memory == "ring"
                else DecayedMoments(groups, dim, memory_size, full)
            )

    # --- from features to scores -------------------------------------------------------------

    def embed(self, features: Tensor) -> Tensor:
        """B x F x h x w features to the B x D x h x w space of the mixture, float32."""
        x: Tensor = self.projection(features).float()
        if not self.normalize_features:
            return x
        with torch.autocast(x.device.type, enabled=False):
            x = self.feature_norm(rearrange(x, "b d h w -> b h w d"))
            return rearrange(F.normalize(x, dim=-1), "b h w d -> b d h w")

    def component_log_density(self, embedding: Tensor) -> Tensor:
        """B x D x h x w embedding to (B h w) x C x M log-densities."""
        return self.mixture.component_log_density(rearrange(embedding, "b d h w -> (b h w) d"))

    def logits(self, class_log_density: Tensor) -> Tensor:
        """N x C log-densities to the logits of p(c|x) under a uniform class prior (Eq. 3)."""
        with torch.autocast(class_log_density.device.type, enabled=False):
            logits: Tensor = self.logit_norm(class_log_density.float())
            return logits

    def class_maps(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and log-densities log p(x|c) of an embedding, both B x C x h x w."""
        density = self.mixture.combine(self.component_log_density(embedding), self.mixture_kind)
        return _to_map(self.logits(density), embedding), _to_map(density, embedding)

    def scores(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Logits B x C x h x w and anomaly score -max_c log p(x|c), B x 1 x h x w, of an embedding."""
        logits, density = self.class_maps(embedding)
        return logits, -density.amax(1, keepdim=True)

    def forward(self, features: Tensor) -> Tensor:
        """B x F x h x w features to class logits B x C x h x w."""
        return self.class_maps(self.embed(features))[0]

    # --- training ----------------------------------------------------------------------------

    def compute_loss(self, features: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Losses for the extractor and the projection.

        Args:
            features: B x F x h x w.
            mask: B x H x W int64, any resolution.

        Returns:
            `loss` (to be minimised), its parts `loss_ce` and `loss_component`, and `embedding`
            (B x D x h x w, detached), which `update_mixture` takes after the optimiser's step.
        """
        embedding = self.embed(features)
        components = self.component_log_density(embedding)
        logits = self.logits(self.mixture.combine(components, self.mixture_kind))
        logits = F.interpolate(_to_map(logits, embedding), mask.shape[-2:], mode="bilinear")
        losses = {"loss_ce": pixel_cross_entropy(logits, mask, self.ignore_index)}
        loss = losses["loss_ce"]
        if self.component_loss_weight:
            labels = self.labels(mask, embedding)
            own = own_class(components.detach(), labels)
            target = self._groups(self._e_step(own, labels), labels)
            losses["loss_component"] = pixel_cross_entropy(
                components.flatten(1), target, ignore_index=self.num_classes * self.components
            )
            loss = loss + self.component_loss_weight * losses["loss_component"]
        return {"loss": loss, **losses, "embedding": embedding.detach()}

    def labels(self, mask: Tensor, embedding: Tensor) -> Tensor:
        """Label of each feature pixel, (B h w); ignored where it is no class or the embedding NaN.

        By `label_reduction` the nearest one, or the most frequent one in its cell.
        """
        size = embedding.shape[-2:]
        if self.label_reduction == "labelled":
            small = labelled_cells(mask, size, self.num_classes, self.ignore_index)
        else:
            small = resize_labels(mask, size)
        valid = embedding.isfinite().all(1) & (small >= 0) & (small < self.num_classes)
        return torch.where(valid, small, self.ignore_index).flatten()

    @torch.no_grad()
    def update_mixture(
        self,
        embedding: Tensor,
        mask: Tensor,
        processes: Processes | None = None,
        remember_only: bool = False,
    ) -> None:
        """Remember this batch and take one EM step (or `em_loops` of them), in place.

        Call it once after every optimiser step. All processes must call it together.

        Args:
            embedding: B x D x h x w, from `compute_loss`.
            mask: B x H x W int64.
            processes: of a distributed run; all end with the same mixture, that of one process with
                the batches joined in the order of the ranks.
            remember_only: leave out the M-step, which the authors' code takes every fifth step.
        """
        if self.memory is None:
            raise GenSegError("train_mixture='gradient' learns by gradient; there is no EM to run.")
        x = rearrange(embedding, "b d h w -> (b h w) d").float()
        x = x.nan_to_num(0, 0, 0)  # their labels are ignored, but 0 * NaN would still be NaN
        labels = self.labels(mask, embedding)
        present = total_over(processes, self._label_counts(labels)) > 0
        for loop in range(1 if remember_only else self.em_loops):
            last = remember_only or loop == self.em_loops - 1
            own = self.mixture.own_log_density(x, labels)
            groups = self._groups(self._e_step(own, labels, processes), labels)
            weights = self._new_weights(groups, processes) if self.assignment == "em" else None
            if self.memory_filter == "correct":
                logits = self.logits(self.mixture.log_density(x, self.mixture_kind))
                groups = torch.where(logits.argmax(1) == labels, groups, self.memory.groups)
            moments = self._remember(x, groups, processes, last)
            if remember_only:
                return
            m_step(
                self.mixture,
                moments,
                self.mean_momentum,
                self.variance_momentum,
                self.variance_floor,
                present,
                weights,
            )

    def _e_step(self, own: Tensor, labels: Tensor, processes: Processes | None = None) -> Tensor:
        return e_step(
            self.mixture,
            own,
            labels,
            self.assignment,
            self.sinkhorn_epsilon,
            self.sinkhorn_iterations,
            processes=processes,
        )

    def _groups(self, log_q: Tensor, labels: Tensor) -> Tensor:
        """Hard assignment as one number per (class, component); C x M where the label is ignored."""
        groups = labels * self.components + log_q.argmax(1)
        return torch.where(labels == self.ignore_index, self.num_classes * self.components, groups)

    def _label_counts(self, labels: Tensor) -> Tensor:
        return count_groups(segments(labels, self.num_classes), self.num_classes + 1)[:-1]

    def _new_weights(self, groups: Tensor, processes: Processes | None) -> Tensor:
        """Mixture weights of plain EM, N_cm / N_c of the batch (Eq. 8), with the means' momentum."""
        size = self.num_classes * self.components
        counts = total_over(processes, count_groups(groups, size + 1)[:-1]).view(
            self.num_classes, self.components
        )
        share = (counts + 1e-3) / (counts + 1e-3).sum(1, keepdim=True)
        momentum = self.mean_momentum
        mixed = momentum * self.mixture.log_weights.exp() + (1 - momentum) * share
        return torch.where(counts.sum(1, keepdim=True) > 0, mixed, self.mixture.log_weights.exp())

    def _remember(
        self, x: Tensor, groups: Tensor, processes: Processes | None, last: bool
    ) -> Moments:
        """Let a spread of the pixels enter the memory; in all loops but the last only on trial."""
        assert self.memory is not None
        size, memory = self.memory.groups, self.memory
        chosen = spread_evenly(groups, size, self.samples_per_component, processes)
        groups = torch.where(chosen, groups, size)
        if last and isinstance(memory, FeatureRing):
            memory.push(*gather_features(x, groups, size, processes))
            return memory.moments()
        batch = batch_moments(x, groups, size, memory.full, processes)
        if last and isinstance(memory, DecayedMoments):
            memory.absorb(batch)
            return memory.moments()
        memory.to(x.device)
        return memory.moments() + batch


def labelled_cells(
    mask: Tensor, size: Sequence[int], num_classes: int, ignore_index: int = 255
) -> Tensor:
    """Most frequent class in each cell of a coarser grid; of equally frequent ones the first.

    Args:
        mask: B x H x W int64; what is no class does not count.
        size: (h, w) of the grid.
        num_classes: C.
        ignore_index: label of cells without a class.

    Returns:
        B x h x w int64.
    """
    batch, height, width = mask.shape
    image, row, column = (torch.arange(n, device=mask.device) for n in mask.shape)
    rows = image[:, None] * size[0] + row * size[0] // height
    cell = rows[:, :, None] * size[1] + column * size[1] // width
    cells = batch * size[0] * size[1]
    valid = (mask >= 0) & (mask < num_classes)
    # Counted without asking how many there are, which would make the CPU wait for the GPU.
    index = torch.where(valid, cell * num_classes + mask, cells * num_classes).flatten()
    counts = index.new_zeros(cells * num_classes + 1).index_add(0, index, torch.ones_like(index))
    counts = counts[:-1].view(cells, num_classes)
    most, label = counts.max(1)
    return torch.where(most > 0, label, ignore_index).view(batch, *size)


def _to_map(rows: Tensor, like: Tensor) -> Tensor:
    batch, _, height, width = like.shape
    return rearrange(rows, "(b h w) c -> b c h w", b=batch, h=height, w=width)


def _check_range(name: str, value: float, low: float, high: float | None) -> None:
    if value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"between {low} and {high}"
        raise GenSegError(f"{name} is {value}; it must be {limits}.")
