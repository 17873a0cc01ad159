"""Small models of GSS and the files that they are made from."""

import json
from copy import deepcopy
from functools import cache

import torch

from lightning_genseg import GSS, VQOptions
from lightning_genseg.methods.gss.colors import class_colors
from lightning_genseg.methods.gss.tokenizers.vq import MaskigeVQ
from tests.contract import NUM_CLASSES, train_by_hand

DECODER = {"level_channels": 16, "fused_channels": 32, "head_channels": 32}
SMALL = {"num_classes": NUM_CLASSES, "encoder": "tu-test_resnet", "decoder": DECODER}
VQ = {"kind": "vq", "downsample": 4, "levels": [4, 4], "channels": 8, "blocks": 1}


def trained():
    """A GSS of 40 steps, for the test's own use."""
    return deepcopy(_trained())


@cache
def _trained():
    torch.manual_seed(0)
    model = GSS(**SMALL)
    train_by_hand(model, 40)
    return model


def write_tokenizer(path, seed=0):
    """What a run of MaskigeTokenizer leaves, of a network that has learned nothing."""
    torch.manual_seed(seed)
    network = MaskigeVQ(VQOptions(**{key: VQ[key] for key in VQ if key != "kind"}))
    state = {f"tokenizer.{key}": value for key, value in network.state_dict().items()}
    colors = torch.tensor(class_colors("lattice", NUM_CLASSES)) / 255
    torch.save({"state_dict": {**state, "maskige.colors": colors}, "tokenizer": VQ}, path)
    return path


def write_colors(path, seed=3):
    path.write_text(json.dumps(class_colors("random", NUM_CLASSES, seed)))
    return path
