"""What GSS makes of masks and images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_genseg.callbacks.pictures import classes_of, spread_samples, to_array, to_picture
from lightning_genseg.errors import GenSegError
from lightning_genseg.files import replace_file
from lightning_genseg.methods.gss.module import GSS
from lightning_genseg.ops.resize import resize_labels, resize_maps
from lightning_genseg.ops.views import evaluation_mode, input_size
from lightning_genseg.plots.pictures import Palette, Picture, colorize, encode, grid


class MaskigePictures(Callback):
    """Draw the maskiges of a few validation images, at every validation of a fit.

    Leaves ``maskiges/step_<step>.png`` in the run's folder. A row is an image; its mask; its
    maskige, as large as the tokenizer sees it; what the tokenizer makes of that; the maskige that
    is predicted, of the whole image at once, also where `inference` has a window, and at the first
    of its scales; and the prediction. The images are spread evenly over the validation set and
    always the same.

    Args:
        num_images: rows.

    Raises:
        ValueError: if `num_images` is not positive; at the start, if the module is no `GSS`.
    """

    def __init__(self, num_images: int = 4) -> None:
        if num_images < 1:
            raise GenSegError(f"num_images is {num_images} but must be 1 or more.")
        self.num_images = num_images
        self._batches: list[dict[str, Any]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the images."""
        if not isinstance(pl_module, GSS):
            raise GenSegError(
                f"MaskigePictures draws what a GSS predicts and {type(pl_module).__name__} is "
                "none: take the callback away."
            )
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        dataset = data.split_dataset("val", data.eval_transform)
        self._batches = spread_samples(dataset, self.num_images)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the picture."""
        log_dir = trainer.log_dir  # asks the other processes
        if trainer.sanity_checking or not self._batches or log_dir is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert isinstance(pl_module, GSS)
        names, palette = classes_of(trainer, pl_module)
        rows = [_row(pl_module, batch, palette) for batch in self._batches]
        titles = ["image", "mask", "maskige", "reconstruction", "predicted maskige", "prediction"]
        picture = grid(rows, titles, list(zip(names, palette, strict=True)))
        path = Path(log_dir) / "maskiges" / f"step_{trainer.global_step:06d}.png"
        replace_file(path, encode(picture, "png"))


@torch.no_grad()
def _row(module: GSS, batch: Mapping[str, Any], palette: Palette) -> list[Picture]:
    batch = move_data_to_device(batch, module.device)
    image, mask = batch["image"], batch["mask"]
    options = module.inference or {}
    first = (options.get("scales") or [1.0])[0]
    seen = resize_maps(image, input_size((image.shape[-2], image.shape[-1]), options, first))
    scale = module.tokenizer.downsample / module.features.stride
    size = [round(side * scale) for side in seen.shape[-2:]]
    maskige = module.maskige(resize_labels(mask, size))
    with evaluation_mode(module):
        reconstruction = module.tokenizer.decode(module.tokenizer.encode(maskige))
        predicted = module.picture(seen)
        scores = module.maps_at_labels(batch)["scores"]
    height, width = size  # the others cover whole cells
    return [
        to_picture(image[0]),
        colorize(to_array(mask[0]), palette),
        *(to_picture(x[0, :, :height, :width]) for x in (maskige, reconstruction, predicted)),
        colorize(to_array(scores[0].argmax(0)), palette),
    ]
