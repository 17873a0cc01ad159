"""What GSS makes of masks and images."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule

from lightning_genseg.callbacks.pictures import SamplePictures, to_array, to_picture
from lightning_genseg.errors import GenSegError
from lightning_genseg.methods.gss.inverse import GSSInverse
from lightning_genseg.methods.gss.module import GSS
from lightning_genseg.ops.inference_options import input_size
from lightning_genseg.ops.resize import resize_labels, resize_maps
from lightning_genseg.ops.views import evaluation_mode
from lightning_genseg.plots.pictures import Palette, Picture, colorize


class MaskigePictures(SamplePictures):
    """Draw the maskiges of a few validation images, at every validation of a fit.

    Leaves ``maskiges/step_<step>.png`` in the run's folder. A row is an image; its mask; its
    maskige, as large as the tokenizer sees it; the tokenizer's reconstruction of that; the
    predicted maskige; and the prediction. The maskige is predicted of the whole image at once, also
    where `inference` has a window, and at the first of its scales. The images are spread evenly
    over the validation set and always the same.

    Raises:
        GenSegError: at the start, if the module is no `GSS`.
    """

    folder = "maskiges"

    def dataset(self, data: Any, pl_module: LightningModule) -> Any:
        """The validation set."""
        if not isinstance(pl_module, GSS | GSSInverse):
            raise GenSegError(
                f"MaskigePictures draws what a GSS predicts and {type(pl_module).__name__} is "
                "none: take the callback away."
            )
        return data.split_dataset("val", data.eval_transform)

    def row(
        self, pl_module: GSS | GSSInverse, batch: Mapping[str, Any], palette: Palette
    ) -> dict[str, Picture]:
        """Image, mask, three maskiges, and prediction."""
        image, mask = batch["image"], batch["mask"]
        options = pl_module.inference or {}
        first = (options.get("scales") or [1.0])[0]
        seen = resize_maps(image, input_size((image.shape[-2], image.shape[-1]), options, first))
        gss = pl_module.prior if isinstance(pl_module, GSSInverse) else pl_module
        scale = gss.tokenizer.downsample / gss.features.stride
        height, width = (round(side * scale) for side in seen.shape[-2:])
        maskige = gss.maskige(resize_labels(mask, (height, width)))
        with evaluation_mode(pl_module):
            reconstruction = gss.tokenizer.decode(gss.tokenizer.encode(maskige))
            predicted = gss.picture(seen)
            scores = pl_module.maps_at_labels(batch)["scores"]
        maskiges = {
            "maskige": maskige,
            "reconstruction": reconstruction,
            "predicted maskige": predicted,
        }
        return {
            "image": to_picture(image[0]),
            "mask": colorize(to_array(mask[0]), palette),
            # The others cover whole cells.
            **{name: to_picture(x[0, :, :height, :width]) for name, x in maskiges.items()},
            "prediction": colorize(to_array(scores[0].argmax(0)), palette),
        }
