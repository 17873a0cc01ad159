"""Cut the authors' numbers down to the files beside this one: `python tests/golden/make.py FOLDER`.

FOLDER has the whole files, whose README says by which code of theirs they were made. Inputs are
random, so that nobody's images are in them. Every file here stays below about 180 KB.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]


def corner(tensor: Tensor, *sizes: int) -> Tensor:
    """The first entries along each of the first dimensions; `compare.close` takes such a part."""
    return tensor[tuple(slice(size) for size in sizes[: tensor.ndim])].contiguous()


def small(tensor: Tensor) -> Tensor:
    """Labels as bytes, which hold all of theirs."""
    return tensor.byte() if tensor.dtype == torch.int64 else tensor


def gmmseg(whole: Tensors) -> Tensors:
    """Two steps with sampling, and corners of the first step's maps."""
    kept = {
        name: value
        for name, value in whole.items()
        if name.startswith(("initial/", "label_reduction/", "sampled/step0/", "sampled/step1/"))
    }
    kept |= {name: corner(whole[name], 2) for name in ("input/features", "input/labels")}
    kept["sampled/initial_ring"] = whole["sampled/initial_ring"]
    kept["sampled/step0/ring"] = corner(whole["sampled/step0/ring"], 1)
    for name, value in whole.items():
        if name.startswith("all/step0/") and len(value.shape) == 4:
            kept[name] = corner(value, 1, 16, 4)
        elif name.startswith("all/step0/") and ("density" in name or "_norm_" in name):
            kept[name] = corner(value, 32)
    return kept


def agmm(whole: Tensors) -> Tensors:
    """All inputs and losses, and corners of gradients and Gaussian maps."""
    kept: Tensors = {}
    for name, value in whole.items():
        if "/grad_features_of_" in name:
            if name.endswith("total"):
                kept[name] = corner(value, 1, 8)
        elif name.endswith("/gaussian_map") and name.startswith("padded"):
            kept[name] = corner(value, 1, 2)  # with the padding
        elif name.endswith(("/gaussian_map", "/scores")):
            kept[name] = corner(value, 3, 5, 4, 8)
        else:
            kept[name] = value
    return kept


def gss(whole: Tensors) -> Tensors:
    """One head with its inputs, losses, tokens and gradients, and the merging of windows."""
    kept = {"colors": whole["colors"]}
    for name, value in whole.items():
        if name.startswith(("mla/", "mla_shared/weights/", "mla_shared/train/")):
            if not name.endswith("relative_position_index"):
                kept[name] = value
        elif name in ("windows/pictures", "windows/merged_class", "windows/is_tie"):
            kept[name] = value
    for stage in (4, 8):
        name = f"mla_shared/train/grad_stage_{stage}"
        kept[name] = corner(whole[name], 2, 2)
    name = "windows/merged_class_shares"
    kept[name] = corner(whole[name], 1, 7, 4)
    return kept


def bam(whole: Tensors) -> Tensors:
    """Weights, one episode with padding, weights of shots, and eight episodes' counts."""
    kept = {
        name: value
        for name, value in whole.items()
        if name.startswith(("weights", "shot_weights/")) and "num_batches" not in name
    }
    for name, value in whole.items():
        part, _, end = name.partition("/")
        if part == "letterboxed" and end.endswith(("support_mask", "valid")):
            kept[name] = corner(value, 1)
        elif part == "letterboxed" and end != "mask":
            kept[name] = corner(value, 1, 8, 12, 12)
        elif part == "counters" and value.ndim and "each_class" not in end:
            kept[name] = corner(value, 6)
    # Of the padding, which has one colour, the first row or column.
    kept["letterboxed/image"] = corner(whole["letterboxed/image"], 1, 3, 41)
    kept["letterboxed/support_image"] = corner(whole["letterboxed/support_image"], 1, 1, 3, 57, 33)
    return kept


PARTS: dict[str, Callable[[Tensors], Tensors]] = {
    "gmmseg": gmmseg,
    "agmm": agmm,
    "gss": gss,
    "bam": bam,
}


if __name__ == "__main__":
    for name, part in PARTS.items():
        target = Path(__file__).with_name(f"{name}.safetensors")
        kept = part(load_file(Path(sys.argv[1]) / target.name))
        save_file({key: small(value) for key, value in kept.items()}, target)
        print(f"{target.name}: {target.stat().st_size / 1000:.0f} KB")
