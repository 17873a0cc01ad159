"""Weights of networks, published or from files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_genseg.errors import DownloadError, GenSegError, MissingFileError, first_line
from lightning_genseg.files import load_tensors
from lightning_genseg.networks.hypercolumns import PlainTransformer

# What published backbones carry beyond the stages a segmentation network uses.
_CLASSIFIER_KEYS = (
    "fc.", "_fc.", "classifier.", "head.", "last_linear.", "linear.", "norm.", "conv_head.", "bn2.",
    "incre_modules.", "downsamp_modules.", "final_layer.",
)  # fmt: skip


def load_weights(
    module: nn.Module,
    path: str | Path,
    prefix: str | None = None,
    ignore: Sequence[str] = (),
    name: str | None = None,
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> None:
    """Load a state dict from a file into a module; every tensor must fit.

    The file may be a state dict, a checkpoint that holds one under ``state_dict`` or ``model``, or
    a ``.safetensors`` file. It is read with ``weights_only=True``: no code in it runs.

    Args:
        module: receives the weights.
        path: the file.
        prefix: what the wanted keys begin with, such as ``"features."``; other keys are left alone.
            None finds the prefix that fits best, such as ``"features.encoder."`` or none.
        ignore: beginnings of keys that the file may have and the module may lack.
        name: of the module in messages; its class when left out.
        rename: turns the content of the file into what the module names so, before all else.

    Raises:
        MissingFileError: there is no such file.
        GenSegError: the file is not a checkpoint, or something does not fit.
    """
    state, expected = read_state_dict(Path(path)), module.state_dict()
    if rename is not None:
        state = rename(state)
    # timm wraps its stages, smp timm: `stages.0.x` in the file is `model.stages_0.x` here, and
    # `blocks.0.x` of a vision transformer `model.model.blocks.0.x`.
    ours = {_plain(key): key for key in expected}
    if prefix is None:
        prefix = _best_prefix(state, ours)
    elif not any(key.startswith(prefix) for key in state):
        tops = sorted({key.split(".")[0] for key in state})
        raise GenSegError(
            f"{str(path)!r} has no key that begins with {prefix!r}: its keys begin with "
            f"{', '.join(tops[:5])}."
        )
    fitting: dict[str, Tensor] = {}
    unexpected, misshaped = [], []
    for key, tensor in state.items():
        if not key.startswith(prefix):
            continue
        key = key.removeprefix(prefix)
        own = key if key in expected else ours.get(_plain(key))
        if own is None:
            if not key.startswith(tuple(ignore)):
                unexpected.append(key)
            continue
        fitting[own] = tensor
        here, there = tuple(expected[own].shape), tuple(tensor.shape)
        if here != there:
            misshaped.append(f"{own} {there} instead of {here}")
    # Files older than PyTorch 0.4 count no batches; the counter matters only without a momentum.
    missing = [k for k in expected if k not in fitting and not k.endswith("num_batches_tracked")]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
    told = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in problems.items()
        if keys
    ]
    if told:
        raise GenSegError(
            f"{str(path)!r} does not fit {name or type(module).__name__}: of its {len(expected)} "
            f"tensors {'; '.join(told)}; give weights of the same architecture."
        )
    module.load_state_dict({**expected, **fitting})


def load_encoder(
    module: nn.Module,
    encoder: str,
    weights: str | Path,
    timm_options: Mapping[str, Any] | None = None,
) -> None:
    """Load published weights or those of a file into an smp encoder.

    Args:
        module: the encoder.
        encoder: its name.
        weights: name of published weights, such as ``"imagenet"``, or the path of a file.
        timm_options: that a ``tu-`` encoder was built with.

    Raises:
        MissingFileError: `weights` is neither a name nor a file.
        GenSegError: the encoder has no such weights, or the file does not fit it.
        DownloadError: they cannot be downloaded.
    """
    import timm
    from segmentation_models_pytorch.encoders import encoders as smp_encoders

    name = encoder.removeprefix("tu-")
    if encoder != name:
        published = ["imagenet"] if timm.is_model_pretrained(name) else []
    else:
        published = list(smp_encoders[encoder]["pretrained_settings"])
    if str(weights) in published:
        _download(module, encoder, str(weights), timm_options or {})
    elif str(weights) == "imagenet":
        raise GenSegError(
            f"encoder {encoder!r} has no published 'imagenet' weights: give encoder_weights a path "
            "or null."
        )
    elif not Path(weights).is_file():
        raise MissingFileError(
            f"encoder_weights {str(weights)!r} is not a file: give 'imagenet', the path of a state "
            "dict, or null."
        )
    else:
        load_weights(module, weights, ignore=_CLASSIFIER_KEYS, name=encoder)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint or ``.safetensors`` file by name; errors as `load_weights`."""
    return state_dict_of(load_tensors(path), path)


def state_dict_of(content: Any, path: Path) -> dict[str, Tensor]:
    """Tensors by name in the content of a file; `path` is for messages."""
    content = content if isinstance(content, Mapping) else {}
    inside = [content.get(key) for key in ("state_dict", "model")]
    content = next((part for part in inside if isinstance(part, Mapping)), content)
    state = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise GenSegError(
            f"{str(path)!r} holds no state dict: give a file of named tensors, or a checkpoint "
            "with the key 'state_dict'."
        )
    return state


def entries_below(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The entries whose names go on after `part`, which may itself lie deeper."""
    found = {}
    for key, value in state.items():
        _, separator, rest = f".{key}".partition(f".{part}")
        if separator:
            found[rest] = value
    return found


def _plain(key: str) -> str:
    return re.sub(r"^(model\.)+", "", key).replace("_", ".")


def _best_prefix(state: Mapping[str, Tensor], ours: Mapping[str, str]) -> str:
    """The prefix in `state` under which most keys of a module are found; the shortest of equals."""
    counts = {"": 0}
    for key in state:
        parts = key.split(".")
        for cut in range(len(parts)):
            if _plain(".".join(parts[cut:])) in ours:
                prefix = "".join(f"{part}." for part in parts[:cut])
                counts[prefix] = counts.get(prefix, 0) + 1
    return max(counts, key=lambda prefix: (counts[prefix], -len(prefix)))


def _download(
    module: nn.Module, encoder: str, weights: str, timm_options: Mapping[str, Any]
) -> None:
    from segmentation_models_pytorch.encoders import get_encoder

    try:
        if isinstance(module, PlainTransformer):
            source: nn.Module = PlainTransformer(**module.described, pretrained=True)
        else:
            source = get_encoder(
                encoder,
                weights=True if encoder.startswith("tu-") else weights,
                depth=module._depth,
                output_stride=module._output_stride,
                **timm_options,
            )
    except Exception as error:  # the hub clients raise types of several libraries
        raise DownloadError(
            f"encoder_weights {weights!r} of {encoder!r} could not be downloaded "
            f"({first_line(error)}): give encoder_weights a path, or null for random weights."
        ) from error
    module.load_state_dict(source.state_dict())
