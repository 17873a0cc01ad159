"""`genseg add-class`: a trained GMMSeg learns one more class from a few images."""

import json
import shlex
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_genseg.cli.messages import say
from lightning_genseg.cli.parser import FunctionCommand
from lightning_genseg.data.dataset import check_sizes
from lightning_genseg.data.images import read_image, read_mask
from lightning_genseg.data.pairing import pair_files
from lightning_genseg.errors import GenSegError
from lightning_genseg.files import make_folder
from lightning_genseg.methods import GMMSeg
from lightning_genseg.methods.checkpoints import guard_checkpoints, read_checkpoint


def add_class(
    ckpt_path: Path,
    root: Path,
    name: str,
    output: Path,
    value: int = 1,
    seed: int = 0,
    shrinkage: float = 0.5,
    method: type[GMMSeg] = GMMSeg,
) -> GMMSeg:
    """Write a checkpoint that knows one more class, see `GMMSeg.add_class`.

    Args:
        ckpt_path: checkpoint of a `GMMSeg`.
        root: folder that holds `images` and `masks`, files of the same names.
        name: of the new class.
        output: checkpoint to write; it must not exist.
        value: that the new class has in the masks; others do not count.
        seed: of the start of EM.
        shrinkage: share, in [0, 1], of the other classes' mean covariance in that of the new one;
            without it the others lose more pixels to a new class of few images.
        method: import path of the class, where it is one of your own (`my_package.MyGMMSeg`).

    Raises:
        MissingFileError: a file or folder does not exist.
        GenSegError: as `GMMSeg.add_class`, or a checkpoint of another method, or `output` exists.
    """
    if output.exists():
        raise GenSegError(f"output '{output}' exists: give the name of a new .ckpt file.")
    make_folder(output.parent, "the folder of output")
    read_checkpoint(
        ckpt_path,
        "ckpt_path",
        "GMMSeg",
        lambda content: "head.mixture.means" in content["state_dict"],
    )
    samples, complaint = pair_files(root / "images", root / "masks")
    if complaint:
        raise GenSegError(complaint)
    images, masks = [], []
    for sample in samples:
        image, mask = read_image(sample.image), read_mask(sample.mask)
        check_sizes(image.shape, mask.shape, sample)
        images.append(torch.from_numpy(image).permute(2, 0, 1).float() / 255)
        masks.append(torch.from_numpy((mask == value).astype("int64")))
    if not any(bool(mask.any()) for mask in masks):
        raise GenSegError(
            f"no mask of '{root / 'masks'}' holds the value {value}: set value to the number that "
            "the new class has there."
        )
    model = method.load_from_checkpoint(ckpt_path, map_location="cpu")
    model.add_class(images, masks, name, seed, shrinkage)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    guard_checkpoints(trainer)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(output, weights_only=True)
    return model


def _tell(arguments: dict[str, Any], model: GMMSeg) -> None:
    *_, name = names = model.all_class_names
    given = shlex.quote(json.dumps(names, ensure_ascii=False))
    say(
        f"class {len(names) - 1} is '{name}'; the checkpoint is {arguments['output']}, for data "
        f"with --data.class_names {given} (and --data.num_classes null, where that is set)"
    )


COMMAND = FunctionCommand(
    "add-class",
    add_class,
    "Teach a trained GMMSeg one more class from a few images, without training.",
    _tell,
)
