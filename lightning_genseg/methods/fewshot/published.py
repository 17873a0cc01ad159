"""Checkpoints of BAM's authors, under the names of this package."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor, nn

from lightning_genseg.networks.weights import load_weights

# Where the stages of their VGG begin in the one list of layers that ours is.
_VGG_STAGES = (0, 7, 14, 24, 34)

# Their names and ours; `{encoder}` and `{base}`, `{classifier}` depend on the module.
_NAMES = {
    r"layer0\.7\.": "{encoder}bn1.",
    r"layer0\.(\d)\.": r"{encoder}conv1.\1.",
    r"layer([1-4])\.": r"{encoder}layer\1.",
    r"(?:learner_base\.0|ppm)\.features\.(\d)\.1\.": r"{base}levels.\1.1.0.",
    r"(?:learner_base\.0|ppm)\.features\.(\d)\.2\.": r"{base}levels.\1.1.1.",
    r"(?:learner_base\.1|cls)\.([01])\.": r"{base}fuse.\1.",
    r"(?:learner_base\.1|cls)\.4\.": "{classifier}",
    r"down_query\.": "reduction.",
    r"down_supp\.": "support_reduction.",
    r"init_merge\.": "decoder.merge.",
    r"ASPP_meta\.layer6_0\.": "decoder.context.",
    r"ASPP_meta\.layer6_1\.": "decoder.branches.0.",
    r"ASPP_meta\.layer6_2\.": "decoder.branches.1.",
    r"ASPP_meta\.layer6_3\.": "decoder.branches.2.",
    r"ASPP_meta\.layer6_4\.": "decoder.branches.3.",
    r"res1_meta\.": "decoder.fuse.",
    r"res2_meta\.0\.": "decoder.residual.0.0.",
    r"res2_meta\.2\.": "decoder.residual.1.0.",
    r"cls_meta\.0\.": "decoder.classifier.0.0.",
    r"cls_meta\.3\.": "decoder.classifier.2.",
    r"gram_merge\.": "ensemble.style.",
    r"cls_merge\.": "ensemble.known.",
    r"kshot_rw\.": "shot_weights.layers.",
}


def load_published(module: nn.Module, path: Path) -> None:
    """Load a checkpoint of BAM's code into a `BaseLearner`, or into a `CGMGM` that is BAM.

    Raises:
        MissingFileError: there is no such file.
        GenSegError: it is no checkpoint, or one of another network.
    """
    load_weights(module, path, prefix="", rename=lambda state: our_names(state, module))


def our_names(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Their tensors under the names of `module`; 1 x 1 convolutions of the shots become linear."""
    names = module.state_dict()
    alone = "pyramid.fuse.0.weight" in names  # a base learner
    parts = {
        "encoder": "features.encoder.",
        "base": "pyramid." if alone else "base_head.0.",
        "classifier": "classifier.1." if alone else "base_head.1.1.",
    }
    vgg = "features.encoder.features.0.weight" in names
    if any(name.startswith("features.encoder.model.") for name in names):
        parts["encoder"] += "model."
    renamed = {}
    for name, tensor in state.items():
        name = name.removeprefix("module.")  # of a run on several GPUs
        place = re.match(r"layer([0-4])\.(\d+)\.(.*)", name)
        if vgg and place:
            stage, index, rest = place.groups()
            name = f"features.encoder.features.{_VGG_STAGES[int(stage)] + int(index)}.{rest}"
        for theirs, ours in _NAMES.items():
            name, found = re.subn(f"^{theirs}", ours.format(**parts), name)
            if found:
                break
        if name.startswith("decoder.merge."):  # query, prototype, prior; ours has the prior second
            tensor = tensor[:, _prior_second(tensor.shape[0])]
        if name.startswith("shot_weights."):
            tensor = tensor.flatten(1) if tensor.ndim == 4 else tensor
        renamed[name] = tensor
    return renamed


def _prior_second(width: int) -> list[int]:
    return [*range(width), 2 * width, *range(width, 2 * width)]
