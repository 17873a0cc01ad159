"""What the methods cost a whole network, beside softmax on the same one."""

from collections.abc import Iterator

import torch
from measure import Row, compare, row

from lightning_genseg import AGMM, EMOptions, GMMSeg, SoftmaxSegmenter

NETWORKS = {"Lite0": "tu-tf_efficientnet_lite0", "ResNet-50": "resnet50"}
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


def gmmseg(device: str, repeats: int) -> Iterator[Row]:
    """A step is losses, backward, memory and every fifth time EM; FPN, batch 4 of 512 x 512."""
    for name, encoder in NETWORKS.items():
        for classes, (training, inference) in GOALS.items():
            network = {"encoder": encoder, "decoder": "fpn"}
            ours = GMMSeg(classes, em=EMOptions(memory_size=1000), **network).to(device)
            softmax = SoftmaxSegmenter(classes, **network).to(device)
            batch = batch_of(classes, 4, 512, device)
            assert ours.head.memory is not None
            ours.head.memory.to(torch.device(device))
            steps = 0

            def train_ours(model: GMMSeg = ours, batch: dict[str, torch.Tensor] = batch) -> None:
                nonlocal steps
                losses = model.compute_loss(batch)
                losses["loss"].backward()
                model.zero_grad()
                arguments = losses["embedding"], batch["mask"], losses["assignment"]
                # Its M-step is measured in every turn but the first, which warms up: at most dear.
                model.update_mixture(*arguments, remember_only=steps == 0)
                steps += 1

            def train_softmax(
                model: SoftmaxSegmenter = softmax, batch: dict[str, torch.Tensor] = batch
            ) -> None:
                model.compute_loss(batch)["loss"].backward()
                model.zero_grad()

            what = f"{name}, C = {classes}"
            times = compare(train_ours, train_softmax, repeats, device)
            yield row(f"GMMSeg training step over softmax, {what}", times, f"≤ {training}")
            ours.eval(), softmax.eval()
            image = batch["image"]
            with torch.inference_mode():
                times = compare(lambda: ours(image), lambda: softmax(image), repeats + 2, device)
            yield row(f"GMMSeg inference over softmax, {what}", times, f"≤ {inference}")


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

    def step(model: SoftmaxSegmenter) -> None:
        model.compute_loss(batch)["loss"].backward()
        model.zero_grad()

    times = compare(lambda: step(ours), lambda: step(softmax), repeats, device)
    yield row("AGMM training step over partial cross-entropy, Lite0, C = 21", times, "≤ 1.15")
