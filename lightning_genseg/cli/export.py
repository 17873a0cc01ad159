"""`genseg export`: a trained model for others, without data, optimiser or this command."""

from pathlib import Path
from typing import Literal

from lightning_genseg.cli.parser import FunctionCommand
from lightning_genseg.data.episodes.support import SupportFolder
from lightning_genseg.errors import GenSegError
from lightning_genseg.methods.base import SegmentationModule
from lightning_genseg.methods.deploy import SUFFIXES, Format, export_model, load_method
from lightning_genseg.methods.fewshot.base import FewShotModule
from lightning_genseg.methods.fewshot.support import SUPPORT_KEYS, Support
from lightning_genseg.methods.trained import TrainedModule
from lightning_genseg.uncertainty.scores import AnomalyName

_HELP = "Write a trained model as ONNX, torch.export, or a folder for the Hugging Face hub."


def export(
    ckpt_path: Path,
    format: Format | Literal["pretrained"] = "onnx",
    output: Path | None = None,
    anomaly_score: AnomalyName | None = None,
    whole_image: bool = False,
    support_root: Path | None = None,
    support_size: int | None = None,
    support_ids: dict[int, int] | None = None,
    method: type[TrainedModule] | None = None,
) -> Path:
    """Write a trained model in a form that needs no command, and with `onnx` no PyTorch.

    Args:
        ckpt_path: checkpoint, or a folder that `save_pretrained` has written.
        format: `onnx`; `torch_export`, for `torch.export.load`; or `pretrained`, a folder for
            `from_pretrained` and the Hugging Face hub.
        output: file or folder to write; beside the checkpoint when left out.
        anomaly_score: another score than that of the checkpoint.
        whole_image: predict whole images once, also where the checkpoint's `inference` asks for
            windows, scales or mirror images, which no graph holds; sizes and margin it does hold.
        support_root: of a few-shot model, a folder with `images` and `masks` of the object.
        support_size: side of the square that supports and images are seen in, in pixels; that of
            the training when left out, or 473 where that is not known.
        support_ids: value in these masks -> 1, 0 or 255.
        method: import path of the class, where it is one of your own (`my_package.MyMethod`).

    Returns:
        `output`.

    Raises:
        GenSegError: the model cannot become a graph, a package or the support is missing, or
            `output` exists.
    """
    beside = ckpt_path.with_name(f"{ckpt_path.stem}-pretrained")
    target = output or (
        beside if format == "pretrained" else ckpt_path.with_suffix(SUFFIXES[format])
    )
    if target.exists():
        raise GenSegError(f"output '{target}' exists: remove it, or give another name.")
    if support_root is None and (support_size is not None or support_ids is not None):
        raise GenSegError(
            "support_size and support_ids are of the files in support_root: give it as well, or "
            "leave them out."
        )
    if format == "pretrained" and (whole_image or support_root is not None):
        option = "whole_image" if whole_image else "support_root"
        raise GenSegError(
            f"a folder for from_pretrained keeps no {option}: leave it out, and give it when the "
            "model is used."
        )
    model = load_method(ckpt_path, method)
    if anomaly_score is not None:
        _segmenter(model).set_anomaly_score(anomaly_score)
    if format == "pretrained":
        model.save_pretrained(target)
        return target
    segmenter = _segmenter(model)
    if support_root is not None:
        if not isinstance(segmenter, FewShotModule):
            raise GenSegError(
                f"support_root is for few-shot models, not for {type(model).__name__}."
            )
        size = segmenter.training_size if support_size is None else support_size
        supports = SupportFolder(support_root, size, support_ids).read()
        segmenter.support = Support(*(supports[key] for key in SUPPORT_KEYS))
    export_model(segmenter, target, format, whole_image)
    return target


def _segmenter(model: TrainedModule) -> SegmentationModule:
    if not isinstance(model, SegmentationModule):
        raise GenSegError(
            f"a {type(model).__name__} knows masks only: export a segmentation model."
        )
    return model


COMMAND = FunctionCommand(
    "export", export, _HELP, lambda _, target: print(f"The model is in {target}")
)
