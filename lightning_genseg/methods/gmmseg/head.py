"""GMMSeg's dense generative classifier, for any network that gives a feature map."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lightning_genseg.arguments import as_options, check_arguments, check_device, check_ignored
from lightning_genseg.errors import GenSegError
from lightning_genseg.methods.gmmseg.options import EMOptions, LogitNorm, MixtureOptions
from lightning_genseg.mixtures.em import e_step, fit, m_step
from lightning_genseg.mixtures.gaussian import GaussianMixture
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
from lightning_genseg.mixtures.sinkhorn import segments
from lightning_genseg.networks.losses import pixel_cross_entropy
from lightning_genseg.ops.processes import Processes, mean_over
from lightning_genseg.ops.resize import labelled_cells, resize_labels


class GMMHead(nn.Module):
    """Projection and class mixtures in place of a softmax classifier.

    GMMSeg: Gaussian Mixture based Generative Semantic Segmentation Models, Liang et al., NeurIPS
    2022. The extractor and the projection learn by cross-entropy on the class log-densities; the
    mixture learns by (Sinkhorn) EM, in `update_mixture`, never by gradient. Where paper and
    authors' code differ both can be chosen; what is as the authors, as the paper and ours: see
    `GMMSeg`.

    Args:
        in_channels: F, channels of the feature map.
        num_classes: C.
        mixture: the mixtures and their space.
        em: how they are fitted.
        logit_norm: `layernorm` over the C log-densities before the cross-entropy (code), or `none`
            (paper). Anomaly scores never pass through it.
        logit_scale: initial gain of that LayerNorm (code 1, learned from there). Between C
            standardised numbers the largest gap is C / sqrt(C - 1): 12 for 150 classes, where a
            gain of 1 will do. For 11 it is 3.5, and no probability can pass 0.77 until the gain
            has grown: short runs on few classes need more.
        component_loss_weight: of the cross-entropy over all C x M components, towards the pixel's
            assigned one; in the code, not in the paper; 0 switches it off.
        dropout: of whole channels before the projection, while training (code).
        avg_non_ignore: mean of the cross-entropy over labelled pixels, or over all of them (code).
        ignore_index: label that does not count.

    Raises:
        GenSegError: an argument out of its range, or a full covariance of too many dimensions.

    Example:
        >>> head = GMMHead(16, num_classes=3, mixture=MixtureOptions(embedding_dim=8))
        >>> features, mask = torch.randn(2, 16, 8, 8), torch.randint(3, (2, 32, 32))
        >>> losses = head.compute_loss(features, mask)
        >>> losses["loss"].backward()                          # then the optimiser's step, then:
        >>> head.update_mixture(losses["embedding"], mask, losses["assignment"])
        >>> head(features).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        mixture: MixtureOptions = MixtureOptions(),
        em: EMOptions = EMOptions(),
        logit_norm: LogitNorm = "layernorm",
        logit_scale: float = 1.0,
        component_loss_weight: float = 0.01,
        dropout: float = 0.1,
        avg_non_ignore: bool = True,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        mixture, em = as_options(MixtureOptions, mixture), as_options(EMOptions, em)
        check_arguments(
            GMMHead.__init__,
            locals(),
            in_channels="[1, inf)",
            logit_scale="(0, inf)",
            component_loss_weight="[0, inf)",
            dropout="[0, 1)",
        )
        check_ignored(num_classes, ignore_index)
        self.options, self.em = mixture, em
        full = mixture.covariance == "full"
        dim = in_channels if mixture.embedding_dim is None else mixture.embedding_dim
        if full and dim > 64:
            raise GenSegError(
                f"covariance='full' is for at most 64 dimensions and the embedding has {dim}; "
                "set embedding_dim to 64 or less, or covariance to 'diagonal'."
            )
        if em.train == "gradient" and (mixture.shrinkage or mixture.class_prior != "uniform"):
            raise GenSegError(
                "mixture.shrinkage and mixture.class_prior belong to EM: leave them out, or set "
                "em.train to em or posthoc."
            )
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.component_loss_weight, self.avg_non_ignore = component_loss_weight, avg_non_ignore

        self.dropout = nn.Dropout2d(dropout)
        self.projection: nn.Module = nn.Identity()
        if mixture.embedding_dim is not None:
            self.projection = nn.Sequential(
                nn.Conv2d(in_channels, dim, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU()
            )
        self.feature_norm = nn.LayerNorm(dim) if mixture.normalize_features else nn.Identity()
        self.logit_norm: nn.Module = nn.Identity()
        if logit_norm == "layernorm":
            self.logit_norm = nn.LayerNorm(num_classes)
            nn.init.constant_(self.logit_norm.weight, logit_scale)
        self._starts_random = False
        self.forget_batches()
        self.mixture = GaussianMixture(
            num_classes,
            mixture.components,
            dim,
            mixture.covariance,
            unit_means=mixture.normalize_features,
            trainable=em.train == "gradient",
            variance_floor=mixture.variance_floor,
            start=mixture.start,
        )
        self.memory = self._empty_memory()
        counted = mixture.class_prior == "frequency"
        counts = torch.zeros(num_classes, dtype=torch.long) if counted else None
        self.class_counts: Tensor | None
        self.register_buffer("class_counts", counts)  # labelled features so far

    def _empty_memory(self) -> FeatureRing | DecayedMoments | None:
        em, dim, full = self.em, self.mixture.dim, self.options.covariance == "full"
        groups = self._no_group
        if em.train == "gradient":
            return None
        if em.memory == "decay":
            memory: FeatureRing | DecayedMoments = DecayedMoments(groups, dim, em.memory_size, full)
        else:
            dtype = getattr(torch, em.memory_dtype)
            memory = FeatureRing(groups, dim, em.memory_size, full, dtype)
        self._starts_random = em.memory_start == "random"
        return memory

    def _fill_memory(self) -> None:
        """Fill it with random unit vectors, if it starts so: what only predicts does without."""
        if not self._starts_random:
            return
        assert self.memory is not None
        self._starts_random, memory = False, self.memory
        generator = torch.Generator().manual_seed(0)  # the same in all processes
        for group in range(memory.groups):  # one at a time: the whole of it may be gigabytes
            drawn = torch.randn(memory.size, memory.dim, generator=generator)
            memory.push(F.normalize(drawn, dim=1), torch.full((memory.size,), group))

    # --- from features to scores -------------------------------------------------------------

    def embed(self, features: Tensor) -> Tensor:
        """B x F x h x w features to the B x D x h x w space of the mixture, float32."""
        return self.normalized(self.projection(self.dropout(features)))

    def normalized(self, projected: Tensor) -> Tensor:
        """What follows the projection in `embed`: LayerNorm and unit length, in float32."""
        x = projected.float()
        if not self.options.normalize_features:
            return x
        with torch.autocast(x.device.type, enabled=False):
            x = self.feature_norm(rearrange(x, "b d h w -> b h w d"))
            return rearrange(F.normalize(x, dim=-1), "b h w d -> b d h w")

    def component_log_density(self, embedding: Tensor) -> Tensor:
        """B x D x h x w embedding to (B h w) x C x M log-densities."""
        return self.mixture.component_log_density(rearrange(embedding, "b d h w -> (b h w) d"))

    def logits(self, class_log_density: Tensor) -> Tensor:
        """N x C log-densities to the logits of p(c|x), Eq. 3, under `mixture.class_prior`."""
        with torch.autocast(class_log_density.device.type, enabled=False):
            logits: Tensor = self.logit_norm(class_log_density.float())
            if self.class_counts is None:
                return logits
            counts = self.class_counts.clamp_min(1).float()  # what never came is rare only
            return logits + (counts / counts.sum()).log()

    def class_maps(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and log-densities log p(x|c) of an embedding, both B x C x h x w."""
        density = self.mixture.combine(self.component_log_density(embedding), self.options.density)
        return _to_map(self.logits(density), embedding), _to_map(density, embedding)

    def scores(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Logits B x C x h x w and anomaly score -max_c log p(x|c), B x 1 x h x w."""
        logits, density = self.class_maps(embedding)
        return logits, -density.amax(1, keepdim=True)

    def forward(self, features: Tensor) -> Tensor:
        """B x F x h x w features to class logits B x C x h x w."""
        return self.class_maps(self.embed(features))[0]

    @torch.no_grad()
    def add_class(self, features: Tensor, seed: int = 0, shrinkage: float = 0.5) -> None:
        """Fit a mixture to N x D features of one more class, and append it as class C.

        The other mixtures stay. `shrinkage` is the share of their mean covariance in the new ones
        (`GaussianMixture.shrink`). The new class has the scale and offset of the mean class in the
        LayerNorm of the logits, and is as frequent as the median class; EM's memory is empty
        again. `seed` is that of the start of EM. The LayerNorm has new parameters: an optimiser of
        the head is to be built anew.

        Raises:
            GenSegError: no features, or not finite ones; class C would be `ignore_index`.
        """
        check_arguments(GMMHead.add_class, locals(), shrinkage="[0, 1]")
        check_ignored(self.num_classes + 1, self.ignore_index)
        options = self.options
        new = fit(
            features,
            components=options.components,
            covariance=options.covariance,
            assignment=self.em.assignment,
            variance_floor=options.variance_floor,
            unit_means=options.normalize_features,
            seed=seed,
        )
        new.shrink(self.mixture, shrinkage)
        self.mixture.append(new)
        if isinstance(self.logit_norm, nn.LayerNorm):
            norm = nn.LayerNorm(self.num_classes + 1).to(self.logit_norm.weight)
            for name, values in self.logit_norm.named_parameters():
                grown: nn.Parameter = getattr(norm, name)
                grown.copy_(torch.cat([values, values.mean()[None]]))
                grown.requires_grad_(values.requires_grad)
            self.logit_norm = norm
        if self.class_counts is not None:
            seen = self.class_counts[self.class_counts > 0]
            usual = seen.median() if len(seen) else seen.sum()
            self.class_counts = torch.cat([self.class_counts, usual[None]])
        self.num_classes += 1
        self.memory = self._empty_memory()
        self.forget_batches()

    # --- training ----------------------------------------------------------------------------

    def compute_loss(self, features: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Losses for the extractor and the projection.

        Args:
            features: B x F x h x w.
            mask: B x H x W int64, any resolution.

        Returns:
            `loss` (to be minimised) and its parts `loss_ce` and `loss_component`. For
            `update_mixture` after the optimiser's step: `embedding` (B x D x h x w, detached) and
            `assignment` (B h w), each feature's component c M + m, or C M where it is ignored.
        """
        mask, embedding = _plain_labels(mask, features), self.embed(features)
        labels = self.labels(mask, embedding)
        rows = rearrange(embedding, "b d h w -> (b h w) d")
        densities = self.mixture.densities(rows, labels, self.options.density)
        logits = self.logits(densities.classes)
        logits = F.interpolate(_to_map(logits, embedding), mask.shape[-2:], mode="bilinear")
        loss = pixel_cross_entropy(logits, mask, self.ignore_index, self.avg_non_ignore)
        losses = {"loss": loss, "loss_ce": loss, "embedding": embedding.detach()}
        if self.component_loss_weight or self.memory is not None:
            log_q = self._e_step(densities.own.detach(), labels)
            losses["assignment"] = self._groups(log_q, labels)
        if self.component_loss_weight:
            # The cross-entropy over all components, towards the assigned one.
            assigned = densities.own.gather(1, log_q.argmax(1, keepdim=True)).squeeze(1)
            valid = losses["assignment"] != self._no_group
            terms = torch.where(valid, densities.total - assigned, 0.0)
            losses["loss_component"] = mean_over(terms.sum(), valid.sum())
            losses["loss"] = loss + self.component_loss_weight * losses["loss_component"]
        return losses

    def labels(self, mask: Tensor, embedding: Tensor) -> Tensor:
        """Label of each feature pixel, (B h w); ignored where it is no class or the embedding NaN.

        By `label_reduction`: of the nearest pixel, of the corner's, or the most frequent one.
        """
        mask, size = _plain_labels(mask, embedding), embedding.shape[-2:]
        if self.em.label_reduction == "labelled":
            small = labelled_cells(mask, size, self.num_classes, self.ignore_index)
        else:
            small = resize_labels(mask, size, corner=self.em.label_reduction == "corner")
        valid = embedding.isfinite().all(1) & (small >= 0) & (small < self.num_classes)
        return torch.where(valid, small, self.ignore_index).flatten()

    def forget_batches(self) -> None:
        """Begin anew: no batch since the last M-step, as at the start of a run."""
        # Classes of the batches of this step so far, and since the last M-step.
        self._of_step: Tensor | None = None
        self._waiting: Tensor | None = None

    def memory_state(self) -> dict[str, Any]:
        """What EM remembers, for the checkpoint of a training."""
        if self.memory is None:
            return {}
        self._fill_memory()
        waiting = {} if self._waiting is None else {"waiting": self._waiting}
        return {**self.memory.state_dict(), **waiting}

    def load_memory_state(self, state: Mapping[str, Any]) -> None:
        """Go on with what EM remembered; a GenSegError if it is of a memory of another kind."""
        if self.memory is not None:
            self.memory.load_state_dict(state)
            self._starts_random = False
            self._waiting = state.get("waiting")

    @torch.no_grad()
    def update_mixture(
        self,
        embedding: Tensor,
        mask: Tensor,
        assignment: Tensor | None = None,
        processes: Processes | None = None,
        remember_only: bool = False,
        accumulating: bool = False,
    ) -> None:
        """Remember this batch and take one EM step (or `em.loops` of them), in place.

        Call it once after every optimiser step. All processes must call it together. The classes of
        the batch are updated, as in the authors' code, and those that were only remembered so far.

        Args:
            embedding: B x D x h x w, from `compute_loss`.
            mask: B x H x W int64.
            assignment: from `compute_loss`; it spares the labels and the first E-step.
            processes: all end with the same mixture, that of one process with the batches joined in
                the order of the ranks; found when left out (`Processes.found`).
            remember_only: leave out the M-step, which the authors' code takes every fifth step.
            accumulating: leave it out because the optimiser has not stepped yet: the classes of
                this batch are updated with those of the step's last one.

        Raises:
            GenSegError: the mixture is trained by gradient.
        """
        if self.memory is None:
            raise GenSegError("em.train='gradient' learns by gradient; there is no EM to run.")
        check_device(embedding.device)
        self._fill_memory()
        em, processes = self.em, processes or Processes.found()
        x = rearrange(embedding, "b d h w -> (b h w) d").float()
        x = x.nan_to_num(0, 0, 0)  # their labels are ignored, but 0 * NaN would still be NaN
        if assignment is None:
            labels = self.labels(mask, embedding)
        else:
            ignored = assignment == self._no_group
            labels = (assignment // self.options.components).masked_fill(ignored, self.ignore_index)
        if processes is not None and em.assignment == "sinkhorn":
            assignment = None  # its equal shares are those of all processes together
        counts = total_over(processes, self._label_counts(labels))
        present = counts > 0
        if self._of_step is not None:
            present = present | self._of_step.to(present.device)
        self._of_step = present if accumulating else None
        remember_only = remember_only or accumulating
        due = waiting = present
        if self._waiting is not None:
            waiting = present | self._waiting.to(present.device)
            due = present | (waiting & ~self.mixture.fitted.any(1))
        self._waiting = waiting if remember_only else None
        if self.class_counts is not None:
            self.class_counts += counts
        for loop in range(1 if remember_only else em.loops):
            last = remember_only or loop == em.loops - 1
            if assignment is None or loop > 0:
                own = self.mixture.own_log_density(x, labels)
                groups = self._groups(self._e_step(own, labels, processes), labels)
            else:
                groups = assignment
            weights = self._new_weights(groups, processes) if em.assignment == "em" else None
            if em.memory_filter == "correct":
                logits = self.logits(self.mixture.log_density(x, self.options.density))
                groups = torch.where(logits.argmax(1) == labels, groups, self._no_group)
            moments = self._remember(x, groups, processes, last)
            if remember_only:
                return
            m_step(
                self.mixture,
                moments.estimate(),
                mean_momentum=em.mean_momentum,
                variance_momentum=em.variance_momentum,
                variance_floor=self.options.variance_floor,
                present=due,
                weights=weights,
                shrinkage=self.options.shrinkage,
            )

    def _e_step(self, own: Tensor, labels: Tensor, processes: Processes | None = None) -> Tensor:
        em = self.em
        return e_step(
            self.mixture,
            own,
            labels,
            em.assignment,
            epsilon=em.sinkhorn_epsilon,
            iterations=em.sinkhorn_iterations,
            processes=processes,
        )

    @property
    def _no_group(self) -> int:
        return self.num_classes * self.options.components

    def _groups(self, log_q: Tensor, labels: Tensor) -> Tensor:
        """Hard assignment c M + m of each pixel; C M where its label is ignored."""
        groups = labels * self.options.components + log_q.argmax(1)
        return torch.where(labels == self.ignore_index, self._no_group, groups)

    def _label_counts(self, labels: Tensor) -> Tensor:
        return count_groups(segments(labels, self.num_classes), self.num_classes + 1)[:-1]

    def _new_weights(self, groups: Tensor, processes: Processes | None) -> Tensor:
        """Weights of plain EM: N_cm / N_c of the batch (Eq. 8, but of hard assignments).

        They have the means' momentum.
        """
        counts = total_over(processes, count_groups(groups, self._no_group + 1)[:-1]).view(
            self.num_classes, self.options.components
        )
        share = (counts + 1e-3) / (counts + 1e-3).sum(1, keepdim=True)
        momentum = self.em.mean_momentum
        mixed = momentum * self.mixture.log_weights.exp() + (1 - momentum) * share
        return torch.where(counts.sum(1, keepdim=True) > 0, mixed, self.mixture.log_weights.exp())

    def _remember(
        self, x: Tensor, groups: Tensor, processes: Processes | None, last: bool
    ) -> Moments:
        """Let a spread of the pixels enter the memory; in all loops but the last only on trial."""
        assert self.memory is not None
        size, memory = self.memory.groups, self.memory
        chosen = spread_evenly(groups, size, self.em.samples_per_component, processes)
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


def _plain_labels(mask: Tensor, features: Tensor) -> Tensor:
    """Masks B x H x W, or with a channel of one, of any dtype, as int64."""
    if mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if mask.ndim != 3 or len(mask) != len(features):
        raise GenSegError(
            f"the masks are {tuple(mask.shape)} and the features {tuple(features.shape)}: give "
            "masks B x H x W of the same images."
        )
    return mask.long()


def _to_map(rows: Tensor, like: Tensor) -> Tensor:
    batch, _, height, width = like.shape
    return rearrange(rows, "(b h w) c -> b c h w", b=batch, h=height, w=width)
