"""What the methods cost a whole network, beside softmax on the same one."""

from collections.abc import Iterator
from functools import partial

import torch
from measure import Row, compare, row

from lightning_genseg import (
    AGMM,
    GSS,
    EMOptions,
    GMMSeg,
    SoftmaxSegmenter,
    TokenDecoderOptions,
)
from lightning_genseg.methods.base import SegmentationModule

NETWORKS = {"Lite0": "tu-tf_efficientnet_lite0", "ResNet-50": "resnet50"}
OBSTACLE = "arithmetic: 5 C Gaussians of 128 products a pixel, where softmax has C of 128"
GOALS = {19: ("1.03", "1.02"), 150: ("1.05", "1.05")}


def batch_of(
    classes: int, images: int, size: int, device: str, labelled: float = 0.9
) -> dict[str, torch.Tensor]:
    """Random images; masks of patches of 32 x 32 pixels, of which some are labelled."""
    torch.manual_seed(1)
    side = -(-size // 32)
    patches = torch.randint(classes, (images, side, side))
    patches[torch.rand(patches.shape) > labelled] = 255
    mask = patches.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, :size, :size]
    image = torch.rand(images, 3, size, size)
    return {"image": image.to(device), "mask": mask.contiguous().to(device)}


def step(model: SegmentationModule, batch: dict[str, torch.Tensor]) -> None:
    """Losses, backward and, of a GMMSeg, memory and EM (which it takes every fifth time only)."""
    losses = model.compute_loss(batch)
    losses["loss"].backward()
    model.zero_grad()
    if isinstance(model, GMMSeg):
        model.update_mixture(losses["embedding"], batch["mask"], losses["assignment"])


def gmmseg(device: str, repeats: int, crop: int = 512) -> Iterator[Row]:
    """FPN, batch 4 of 512 x 512, or of other crops."""
    sizes = f"batch 4 of {crop} x {crop}"
    for name, encoder in NETWORKS.items():
        for classes, (training, inference) in GOALS.items():
            network = {"encoder": encoder, "decoder": "fpn"}
            ours = GMMSeg(classes, em=EMOptions(memory_size=1000), **network).to(device)
            softmax = SoftmaxSegmenter(classes, **network).to(device)
            batch = batch_of(classes, 4, crop, device)
            assert ours.head.memory is not None
            ours.head.memory.to(torch.device(device))
            what = f"{name}, C = {classes}"
            both = [partial(step, model, batch) for model in (ours, softmax)]
            times = compare(*both, repeats, device)
            yield row(
                f"GMMSeg training step over softmax, {what}",
                times,
                f"≤ {training}",
                detail=sizes,
                obstacle="not found",
            )
            both = [partial(model.eval(), batch["image"]) for model in (ours, softmax)]
            with torch.inference_mode():
                times = compare(*both, repeats + 2, device)
            yield row(
                f"GMMSeg inference over softmax, {what}",
                times,
                f"≤ {inference}",
                detail=sizes,
                obstacle=OBSTACLE,
            )


def agmm(device: str, repeats: int) -> Iterator[Row]:
    """FPN, Lite0, 8 crops of 192 x 192, C = 21, a hundredth of the pixels labelled."""
    network = {"encoder": NETWORKS["Lite0"], "decoder": "fpn"}
    ours, softmax = AGMM(21, **network).to(device), SoftmaxSegmenter(21, **network).to(device)
    batch = batch_of(21, 8, 192, device)
    few = torch.rand(batch["mask"].shape, device=device) < 0.01
    # Points lie on few of an image's patches: five classes an image, as in VOC's clicks.
    batch["mask"] = torch.where(few, batch["mask"] % 5, 255)
    held = (batch["mask"][:, None] == torch.arange(21, device=device)[:, None, None]).any((2, 3))
    batch |= {"unlabelled": batch["mask"] == 255, "image_classes": held}

    both = [partial(step, model, batch) for model in (ours, softmax)]
    times = compare(*both, repeats, device)
    yield row("AGMM training step over partial cross-entropy, Lite0, C = 21", times, "≤ 1.15")


def gss(device: str, repeats: int) -> Iterator[Row]:
    """ResNet-50 and GSS' decoder, 2 crops of 256 x 256, beside softmax on the same network."""
    options = {"level_channels": 384, "fused_channels": 512}
    network = {"encoder": NETWORKS["ResNet-50"]}
    mla = {"level_channels": 384, "decoder_channels": 512, "depth": 2, "stride": 4}
    softmax = SoftmaxSegmenter(150, decoder="mla", network_options=mla, **network).to(device)
    batch = batch_of(150, 2, 256, device)

    for vocabulary in (None, 512):
        tokenizer = {"kind": "vq", "levels": [8, 8, 8, 16], "channels": 32, "blocks": 1}
        decoder = TokenDecoderOptions(**options, vocabulary=vocabulary)
        ours = GSS(150, decoder=decoder, tokenizer=tokenizer, **network).to(device)
        which = "all have logits" if vocabulary is None else f"vocabulary of {vocabulary}"
        times = compare(
            partial(step, ours, batch), partial(step, softmax, batch), repeats // 2, device
        )
        yield row(
            f"GSS training step over softmax, 8192 tokens, {which}",
            times,
            "≤ 3",
            obstacle="logits of every token, forwards and twice backwards",
        )
