"""Weights from files: whose they are, and what of them fits."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from segmentation_models_pytorch.encoders import get_encoder
from torch import Tensor, nn

from lightning_genseg.errors import DownloadError, GenSegError, MissingFileError

# What published backbones carry beyond the stages a segmentation network uses.
_CLASSIFIER_KEYS = (
    "fc.", "_fc.", "classifier.", "head.", "last_linear.", "linear.", "norm.", "conv_head.", "bn2.",
    "incre_modules.", "downsamp_modules.", "final_layer.",
)  # fmt: skip


def load_weights(
    module: nn.Module, path: str | Path, prefix: str | None = None, ignore: Sequence[str] = ()
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

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a checkpoint, or something does not fit.
    """
    path = Path(path)
    names = (repr(str(path)), type(module).__name__)
    _fit_state(module, read_state_dict(path), names, prefix, ignore)


def _fit_state(
    module: nn.Module,
    state: Mapping[str, Tensor],
    names: tuple[str, str],
    prefix: str | None,
    ignore: Sequence[str],
) -> None:
    """Load `state` strictly; `names` say for messages what is loaded and into what."""
    source, target = names
    expected = module.state_dict()
    # timm wraps its stages: `stages.0.x` in the file is `model.stages_0.x` in an smp encoder.
    ours = {_plain(key): key for key in expected}
    if prefix is None:
        prefix = _best_prefix(state, ours)
    elif not any(key.startswith(prefix) for key in state):
        tops = sorted({key.split(".")[0] for key in state})
        raise GenSegError(
            f"{source} has no key that begins with {prefix!r}: its keys begin with "
            f"{', '.join(tops[:5])}."
        )
    fitting: dict[str, Tensor] = {}
    unexpected, misshaped = [], []
    for key, tensor in state.items():
        if not key.startswith(prefix):
            continue
        key = key.removeprefix(prefix)
        name = key if key in expected else ours.get(_plain(key))
        if name is None:
            if not key.startswith(tuple(ignore)):
                unexpected.append(key)
        elif tensor.shape != expected[name].shape:
            misshaped.append(
                f"{name} {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
            )
            fitting[name] = expected[name]
        else:
            fitting[name] = tensor
    # Files older than PyTorch 0.4 count no batches; the counter matters only without a momentum.
    missing = [k for k in expected if k not in fitting and not k.endswith("num_batches_tracked")]
    problems = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (
            ("missing", missing), ("unexpected", unexpected), ("of another shape", misshaped),
        )
        if keys
    ]  # fmt: skip
    if problems:
        raise GenSegError(
            f"{source} does not fit {target}: of its {len(expected)} tensors "
            f"{'; '.join(problems)}; give weights of the same architecture."
        )
    module.load_state_dict({**expected, **fitting})


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint or ``.safetensors`` file by name; errors as `load_weights`."""
    if not path.is_file():
        raise MissingFileError(f"There is no weights file {str(path)!r}.")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        SafetensorError,
    ) as e:
        raise GenSegError(
            f"{str(path)!r} cannot be read as a checkpoint: it is damaged, or no file of plain "
            "tensors written by torch.save or safetensors."
        ) from e
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        content = {}
    state = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise GenSegError(
            f"{str(path)!r} holds no state dict: give a file of named tensors, or a checkpoint "
            "with the key 'state_dict'."
        )
    return state


def _plain(key: str) -> str:
    return key.removeprefix("model.").replace("_", ".")


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


def first_line(error: BaseException) -> str:
    """Type and first line of an error, to be put into a sentence."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def _download(
    module: nn.Module, encoder: str, weights: str, timm_options: Mapping[str, Any]
) -> None:
    try:
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
