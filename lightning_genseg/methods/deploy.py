"""Trained methods as graphs that run without this package: ONNX and torch.export."""

from __future__ import annotations

import io
import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lightning_genseg.arguments import check_arguments
from lightning_genseg.errors import GenSegError, MissingFileError
from lightning_genseg.files import make_folder, replace_file, replace_written
from lightning_genseg.methods.base import SegmentationModule
from lightning_genseg.methods.checkpoints import read_run
from lightning_genseg.methods.hub import subclass_named
from lightning_genseg.methods.trained import TrainedModule
from lightning_genseg.networks.features import PixelFeatures
from lightning_genseg.ops.inference_options import graph_options, plain_options
from lightning_genseg.ops.views import infer_once, softmax

Format = Literal["onnx", "torch_export"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch_export": ".pt2"}

_AXES = {0: "batch", 2: "height", 3: "width"}
# Two images, whose sides are no multiples of what networks need: no size is a special case.
_EXAMPLE = (2, 3, 74, 106)


class Deployable(nn.Module):
    """A copy of a method that does in one call what `predict_image` does, for a graph.

    Images B x 3 x H x W in [0, 1], of any size and number, to a dict with

    - `mask` B x H x W int64, and `probabilities` B x C x H x W float32 of the classes;
    - `anomaly` B x H x W float32, where the method has an anomaly score;
    - `anomaly_mask` B x H x W bool, what lies above the threshold, after calibration.

    Args:
        model: the method; a few-shot method has a support.
        whole_image: predict an image whole and once where `model.inference` has windows, scales or
            mirror images, which no graph holds. Thresholds that were found with them are left out.
            Its sizes and its margin are always followed.

    Raises:
        GenSegError: the method, or one of its options, cannot become a graph.
    """

    def __init__(self, model: SegmentationModule, whole_image: bool = False) -> None:
        super().__init__()
        problem = model.undeployable()
        if problem is not None:
            raise GenSegError(problem)
        options = graph_options(model.inference)
        left_out = plain_options(model.inference).keys() - options.keys()
        if left_out and not whole_image:
            raise GenSegError(
                f"the model predicts with inference {', '.join(sorted(left_out))}, and a graph "
                "predicts an image whole and once: set whole_image to true, or change the "
                "checkpoint's inference."
            )
        # Without its Trainer, of which it is no part.
        self.model = deepcopy(model, {id(model._trainer): None}).eval().cpu()
        self.model.inference = options
        if self.model.anomaly.inference != self.model.prediction_options():
            self.model.anomaly.thresholds = {}
        self.model.requires_grad_(False)
        for name, module in list(self.model.named_modules()):
            if isinstance(module, nn.AdaptiveAvgPool2d):
                self.model.set_submodule(name, _AveragePool(module.output_size))
        features = getattr(self.model, "features", None)
        if isinstance(features, PixelFeatures):  # which pads images to whole strides
            _pad_by_fixed_amounts(features.encoder)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """See the class."""
        maps = infer_once(self.model.maps_to_average, image, self.model.inference or {})
        maps = self.model.from_average(maps)
        prediction = self.model._prediction(maps)
        mask, probabilities = prediction.pop("mask"), softmax(maps["scores"])
        return {"mask": mask, "probabilities": probabilities, **prediction}

    def facts(self) -> dict[str, Any]:
        """What a file says of its model: classes, score, threshold."""
        model = self.model
        threshold = model.anomaly.thresholds.get(str(model.anomaly_score))
        return {
            "method": type(model).__name__,
            "class_names": model.all_class_names,
            "anomaly_score": model.anomaly_score,
            "threshold": None if threshold is None else threshold._asdict(),
        }


@torch.no_grad()
def export_model(
    model: SegmentationModule, path: Path, format: Format = "onnx", whole_image: bool = False
) -> list[str]:
    """Write a method as a graph with one input, `image`; see `Deployable` for its outputs.

    Number and size of the images are free. ONNX needs the packages onnx and onnxscript.

    Args:
        model: the method.
        path: of the file; ONNX keeps weights of more than 2 GB in a file beside it.
        format: `onnx`, or `torch_export` for `torch.export.load`.
        whole_image: see `Deployable`.

    Returns:
        the names of the outputs, in their order.

    Raises:
        GenSegError: the method cannot become a graph, or a package is missing.
        UnwritableError: the file cannot be written; what was there before is unchanged.
    """
    check_arguments(export_model, locals())
    path = Path(path)
    graph = Deployable(model, whole_image)
    example = torch.rand(_EXAMPLE)
    names, facts = list(graph(example)), graph.facts()
    make_folder(path.parent, "output")
    with _quiet():
        if format == "torch_export":
            program = export_program(graph, example)
            content = io.BytesIO()
            torch.export.save(program, content, extra_files={"genseg.json": json.dumps(facts)})
            replace_file(path, content.getbuffer())
            return names
        missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
        if missing:
            raise GenSegError(
                f"format onnx needs {' and '.join(missing)}: install the extra 'export' of "
                "lightning-genseg, or take format torch_export."
            )
        written = torch.onnx.export(
            export_program(graph, example),
            (example,),
            dynamo=True,
            input_names=["image"],
            output_names=names,
            verbose=False,
        )
    assert written is not None
    _name_axes(written.model)
    values = {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()
    }
    written.model.metadata_props.update(values)
    replace_written(path, written.save)
    return names


def export_program(graph: nn.Module, example: Tensor) -> ExportedProgram:
    """The graph of a module whose images have any number and size."""
    axes = (dict.fromkeys(_AXES, Dim.DYNAMIC),)
    return torch.export.export(graph, (example,), dynamic_shapes=axes, strict=False)


def load_method(path: Path, kind: type[TrainedModule] | None = None) -> TrainedModule:
    """A trained method of any kind, from a checkpoint or a folder of `save_pretrained`.

    Args:
        path: of the checkpoint or the folder.
        kind: its class; left out, one that is imported already and has the name that it says.

    Raises:
        MissingFileError: there is nothing.
        GenSegError: it is neither, or does not say which method it is.
    """
    if path.is_dir():
        return (kind or TrainedModule).from_pretrained(path)
    if not path.is_file():
        address = re.match(r"\w+:/", str(path)) is not None  # a Path has one slash of it
        remedy = "download it and give its path" if address else "give a checkpoint of a run"
        raise MissingFileError(f"ckpt_path '{path}' does not exist here: {remedy}.")
    content = read_run(path, f"ckpt_path '{path}'")
    saved = content.get("hyper_parameters", {})
    name = content.get("method") or str(saved.get("_class_path", "")).rpartition(".")[2]
    kind = kind or subclass_named(TrainedModule, name)  # type: ignore[type-abstract]
    if kind is None:
        raise GenSegError(
            f"ckpt_path '{path}' is of a method {name or 'without name'}, which is not known here: "
            "give the import path of a class of your own as method, or save it again with this "
            "version of lightning_genseg."
        )
    return kind.load_from_checkpoint(path, map_location="cpu").eval()


def _pad_by_fixed_amounts(encoder: nn.Module) -> None:
    """Of an encoder in place: what timm pads by the size of the image, as TensorFlow does.

    Sizes of a graph are expressions, and each such layer would nest them deeper: tracing would not
    end.
    """
    from timm.layers.conv2d_same import Conv2dSame
    from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame

    for name, module in list(encoder.named_modules()):
        if isinstance(module, Conv2dSame | MaxPool2dSame | AvgPool2dSame):
            encoder.set_submodule(name, _SamePadded(module))


class _SamePadded(nn.Module):
    """A layer with TensorFlow's SAME padding, on sizes that are multiples of its stride."""

    def __init__(self, layer: nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) -> None:
        super().__init__()
        self.layer = layer
        self.plain: Any = next(
            kind for kind in (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d) if isinstance(layer, kind)
        )
        self.value = -torch.inf if self.plain is nn.MaxPool2d else 0.0
        self.padding: list[int] = []
        for axis in (1, 0):
            kernel, stride, dilation = (
                part[axis] if isinstance(part, tuple) else part
                for part in (layer.kernel_size, layer.stride, getattr(layer, "dilation", 1))
            )
            missing = max((kernel - 1) * dilation + 1 - stride, 0)
            self.padding += [missing // 2, missing - missing // 2]

    def forward(self, x: Tensor) -> Tensor:
        """As the layer."""
        result: Tensor = self.plain.forward(self.layer, F.pad(x, self.padding, value=self.value))
        return result


class _AveragePool(nn.Module):
    """`nn.AdaptiveAvgPool2d` by two matrices: its own graph holds for one size of images only."""

    def __init__(self, size: Any) -> None:
        super().__init__()
        self.size = size if isinstance(size, tuple | list) else (size, size)

    def forward(self, x: Tensor) -> Tensor:
        """B x C x H x W to B x C x cells."""
        rows, columns = (
            _shares(side, cells, x) for side, cells in zip(x.shape[-2:], self.size, strict=True)
        )
        return rows @ x @ columns.mT


def _shares(side: int, cells: int, like: Tensor) -> Tensor:
    """How much each of the pixels of a side is of the mean of each cell: cells x side."""
    cell = torch.arange(cells, device=like.device)[:, None]
    pixel = torch.arange(side, device=like.device)
    start, end = cell * side // cells, ((cell + 1) * side + cells - 1) // cells
    inside = (pixel >= start) & (pixel < end)
    return inside.to(like.dtype) / (end - start).to(like.dtype)


def _name_axes(model: Any) -> None:
    """Call the free axes by their names, and not by the exporter's symbols."""
    image = model.graph.inputs[0]
    names = {str(image.shape[axis]): name for axis, name in _AXES.items()}
    for value in (*model.graph.inputs, *model.graph.outputs):
        for axis, size in enumerate(value.shape):
            if str(size) in names:
                value.shape[axis] = names[str(size)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' notes on their own affairs."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
