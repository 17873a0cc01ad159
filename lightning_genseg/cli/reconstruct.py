"""`genseg reconstruct`: how much of the masks a tokenizer with its colours keeps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from lightning_genseg.arguments import check_arguments
from lightning_genseg.cli.parser import DataCommand
from lightning_genseg.data.datamodule import SegmentationDataModule, Split
from lightning_genseg.errors import GenSegError
from lightning_genseg.files import make_folder, replace_file
from lightning_genseg.methods.gss.colors import Colors, class_colors
from lightning_genseg.methods.gss.maskige import LeastSquares, Maskige, NearestColor
from lightning_genseg.methods.gss.tokenizers.load import make_tokenizer
from lightning_genseg.methods.gss.tokenizers.majority import CellMajority
from lightning_genseg.methods.gss.tokenizers.reconstruction import Reconstruction, reconstruct
from lightning_genseg.methods.gss.tokenizers.tokenizer import Tokenizer
from lightning_genseg.metrics.segmentation import segmentation_metrics
from lightning_genseg.ops.resize import labelled_cells, resize_labels
from lightning_genseg.plots.pictures import Picture, Sheet, colorize

_HELP = (
    "Draw all masks of a split as maskiges, tokenize and decode them: what GSS can reach at best "
    "with this tokenizer and these colours, before it is trained. Takes the configuration files of "
    "the other commands, and from their model the tokenizer and the colours."
)
_STRIDE = 4  # pixels of the image for each token that stage two predicts


@torch.no_grad()
def reconstruct_data(
    data: SegmentationDataModule,
    tokenizer: str | Path | dict[str, Any] = "majority-4",
    colors: Colors = "lattice",
    color_seed: int = 0,
    inverse: Literal["nearest", "lstsq"] = "nearest",
    scales: list[float] | None = None,
    split: Split = "val",
    output_dir: Path = Path("reconstruction"),
    num_pictures: int = 3,
) -> dict[str, Any]:
    """Mask to maskige to tokens and back, for all masks of a split.

    Writes `reconstruct.json`, which is what is returned, and `reconstruct.png`: masks, maskiges,
    their reconstructions and the masks decoded from these. GSS' own evaluation (Table 1) is at
    scale 1; stage two draws masks at f / 4.

    Args:
        data: whose masks.
        tokenizer: `majority-4` or `majority-8`; the .ckpt of a `MaskigeTokenizer` run; the file of
            a DALL-E dVAE.
        colors: of the classes, by the name of a table, in a file, or in a list.
        color_seed: of tables that are drawn at random.
        inverse: of the maskige: the nearest colour, or the least squares that the paper prints.
        scales: at which masks are drawn, relative to their size; default: 1 and f / 4.
        split: train, val or test.
        output_dir: folder to write to.
        num_pictures: masks drawn, at the first scale.

    Returns:
        A dict of what was measured (`data`, `split`, `images`, `tokenizer`, `fingerprint`,
        `codebook_size`, `downsample`, `colors`, `inverse`) and `scales`, by scale a dict with

        - `mIoU`, `pixel_accuracy`, and `IoU` by class (null where a class does not occur),
        - `majority`: mIoU and pixel accuracy of `CellMajority` with the same cells, in which
          ignored pixels have no vote,
        - `tokens`, of the cells with a labelled pixel: how many are `used`, their `perplexity` and
          `entropy`, and the `conditional_entropy` given the commonest class of the cell, in bits.
          The last is what only the image can tell beside the class.

    Raises:
        GenSegError: a wrong argument, no such tokenizer or one that does not fit, or a split
            without a labelled pixel.
    """
    check_arguments(reconstruct_data, locals(), scales="(0, inf)", num_pictures="[0, inf)")
    if hasattr(data, "target_classes"):
        raise GenSegError(
            "reconstruct draws masks in the colours of the universal classes and those of "
            "CrossDomainDataModule have others: give MixedDataModule, or the datamodule of the "
            "test set itself."
        )
    data = data.source
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = class_colors(colors, data.num_classes, color_seed)
    maskige = Maskige(table).to(device)
    model = make_tokenizer(tokenizer, maskige.colors[:-1].cpu()).to(device)
    chosen = list(dict.fromkeys(scales or [1.0, model.downsample / _STRIDE]))
    back = (NearestColor if inverse == "nearest" else LeastSquares)(maskige.colors[:-1])
    measured = [_Scale(scale, model, maskige, data.num_classes) for scale in chosen]
    output_dir = Path(output_dir)
    make_folder(output_dir, "output_dir")  # before the long part
    data.prepare_data()
    loader = data.plain_loader(split)
    wanted = set(np.linspace(0, max(len(loader) - 1, 0), num_pictures).round().astype(int).tolist())
    sheet = Sheet(data.class_names, data.palette)
    images = 0
    for number, batch in enumerate(
        tqdm(loader, f"reconstructing {split}", unit="batch", disable=None)
    ):
        mask = batch["mask"].to(device)
        images += len(mask)
        found = [one.update(mask, back) for one in measured]
        if number in wanted:
            true, decoded = mask[0].cpu().numpy(), found[0].scores[0].argmax(0).cpu().numpy()
            drawn = colorize(true, data.palette, void=sheet.void)
            pictures = (_picture(maskige(mask[:1])[0]), _picture(found[0].picture[0]))
            row = [drawn, *pictures, colorize(decoded, data.palette)]
            sheet.add(batch["name"][0], row, true, decoded)
    report = {
        "data": type(data).__name__,
        "split": split,
        "images": images,
        "tokenizer": str(tokenizer),
        "fingerprint": model.fingerprint(),
        "codebook_size": model.codebook_size,
        "downsample": model.downsample,
        "colors": [list(color) for color in table],
        "inverse": inverse,
        "scales": {f"{one.scale:g}": one.compute(data.class_names) for one in measured},
    }
    text = json.dumps(report, indent=1, ensure_ascii=False)
    replace_file(output_dir / "reconstruct.json", text.encode())
    titles = ["mask", "maskige", "reconstruction", "decoded mask"]
    sheet.write(output_dir / "reconstruct.png", titles)
    return report


def summary(report: dict[str, Any]) -> str:
    """Text for a screen of what `reconstruct_data` has found."""
    scales: dict[str, dict[str, Any]] = report["scales"]
    width = max(map(len, ["conditional entropy, bits", *next(iter(scales.values()))["IoU"]]))

    def line(name: str, values: list[float | None], form: str) -> str:
        cells = ("-" if value is None else format(value, form) for value in values)
        return f"{name:{width}}" + "".join(f"{cell:>12}" for cell in cells)

    def each(*keys: str) -> list[Any]:
        values: list[Any] = list(scales.values())
        for key in keys:
            values = [value[key] for value in values]
        return values

    f = report["downsample"]
    lines = [
        f"{report['tokenizer']} ({report['codebook_size']} tokens of {f} x {f} pixels) on "
        f"{report['images']} masks of {report['data']}, {report['split']}",
        "",
        f"{'scale':{width}}" + "".join(f"{scale:>12}" for scale in scales),
        line("mIoU", each("mIoU"), ".2%"),
        line(f"  majority-{f}", each("majority", "mIoU"), ".2%"),
        line("pixel accuracy", each("pixel_accuracy"), ".2%"),
        line(f"  majority-{f}", each("majority", "pixel_accuracy"), ".2%"),
        line("tokens used", each("tokens", "used"), "d"),
        line("perplexity", each("tokens", "perplexity"), ".1f"),
        line("entropy, bits", each("tokens", "entropy"), ".2f"),
        line("conditional entropy, bits", each("tokens", "conditional_entropy"), ".2f"),
        "",
        "IoU",
        *(line(name, each("IoU", name), ".2%") for name in next(iter(scales.values()))["IoU"]),
    ]
    return "\n".join(lines)


COMMAND = DataCommand(
    "reconstruct", reconstruct_data, summary, _HELP, of_model=("tokenizer", "colors", "color_seed")
)


class _Scale:
    """What is counted at one scale."""

    def __init__(self, scale: float, tokenizer: Tokenizer, maskige: Maskige, classes: int) -> None:
        self.scale, self.tokenizer, self.maskige = scale, tokenizer, maskige
        colors = maskige.colors[:-1]
        self.majority = CellMajority(colors, tokenizer.downsample)
        self.nearest = NearestColor(colors)
        self.scores = segmentation_metrics(classes).to(colors.device)
        self.baseline = segmentation_metrics(classes).to(colors.device)
        self.counts = torch.zeros(classes, tokenizer.codebook_size, dtype=torch.int64)

    def update(self, mask: Tensor, inverse: torch.nn.Module) -> Reconstruction:
        found = reconstruct(mask, self.maskige, self.tokenizer, inverse, self.scale)
        self.scores.update(found.scores.argmax(1), mask)
        classes, count = self.counts.shape
        common = labelled_cells(mask, found.tokens.shape[-2:], classes, ignore_index=classes)
        labelled = common < classes
        common = common.where(labelled, 0)
        # Ignored pixels would vote for the class whose colour is nearest to theirs.
        filled = mask.where(mask < classes, resize_labels(common, mask.shape[-2:]))
        plain = reconstruct(filled, self.maskige, self.majority, self.nearest, self.scale)
        self.baseline.update(plain.scores.argmax(1), mask)
        pairs = (common * count + found.tokens)[labelled]
        self.counts += pairs.bincount(minlength=self.counts.numel()).view_as(self.counts).cpu()
        return found

    def compute(self, class_names: list[str]) -> dict[str, Any]:
        if not self.counts.any():
            raise GenSegError("the split has no labelled pixel: choose another.")
        values, baseline = self.scores.compute(), self.baseline.compute()
        iou = values["IoU"].tolist()
        return {
            "mIoU": values["mIoU"].item(),
            "pixel_accuracy": values["pixel_accuracy"].item(),
            "IoU": {
                name: None if math.isnan(value) else value
                for name, value in zip(class_names, iou, strict=True)
            },
            "majority": {key: baseline[key].item() for key in ("mIoU", "pixel_accuracy")},
            "tokens": token_statistics(self.counts),
        }


def token_statistics(counts: Tensor) -> dict[str, float | int]:
    """Statistics of tokens counted by class, K x V: see `reconstruct_data`; entropies in bits."""
    joint = counts.double() / counts.sum()

    def entropy(shares: Tensor) -> float:
        return float(-torch.special.xlogy(shares, shares).sum()) / math.log(2)

    of_tokens = entropy(joint.sum(0))
    return {
        "used": int((counts.sum(0) > 0).sum()),
        "perplexity": 2**of_tokens,
        "entropy": of_tokens,
        "conditional_entropy": entropy(joint) - entropy(joint.sum(1)),
    }


def _picture(maskige: Tensor) -> Picture:
    array: Picture = (maskige * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return array
