"""Trained methods in a folder or on the Hugging Face hub: weights, arguments, and a model card."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import lightning
import torch
from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from safetensors.torch import load_file, save
from torch import Tensor

from lightning_genseg.errors import DownloadError, GenSegError, MissingFileError
from lightning_genseg.files import replace_file
from lightning_genseg.methods.checkpoints import plain, refuse_foreign_arguments
from lightning_genseg.methods.optimisation import OptimisedModule

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_SEPARATOR = "/"  # in names of tensors that are not of the state dict: the way to them
_OF_WEIGHTS = ("data", "palette", "scores", "size", "steps")  # facts that change with a checkpoint
_NO_LOADER = ("state_dict", "hyper_parameters")  # the parts that have a place of their own

Method = TypeVar("Method", bound="SharedModule")


class SharedModule(OptimisedModule, ModelHubMixin):
    """Base of what can be shared: `save_pretrained`, `from_pretrained`, `push_to_hub`.

    A folder has `model.safetensors`, what a checkpoint holds without optimiser and memory;
    `config.json`, the arguments; and `README.md`, a model card. Nothing in it is executed.

    Attributes:
        facts: what is known of the training, for the card: `data`, `palette`, `scores` by split,
            `steps`, `command`, of few-shot methods `size`; your own entries are printed as they
            are, and kept as numbers, lists and words.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.facts: dict[str, Any] = {}

    # --- Lightning ----------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say which method it is and what it was trained on."""
        super().on_save_checkpoint(checkpoint)
        if self._trainer is not None and self.trainer.state.fn == "fit":
            self._note_training()
        checkpoint["method"] = type(self).__name__
        if self.own_features is not None:
            checkpoint["own_features"] = self.own_features
        checkpoint["facts"] = _in_words(plain(self.facts))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up what it says of the training."""
        super().on_load_checkpoint(checkpoint)
        kept = {key: value for key, value in self.facts.items() if key not in _OF_WEIGHTS}
        self.facts = {**checkpoint.get("facts", {}), **kept}

    def on_fit_end(self) -> None:
        """Note for the model card what the model was trained on."""
        self._note_training()

    def on_test_end(self) -> None:
        """Note the scores for the model card."""
        self._note_scores("test")

    def _note_training(self) -> None:
        data = getattr(self.trainer, "datamodule", None)
        self._note_scores("val")
        self.facts["steps"] = self.trainer.global_step
        if data is not None:
            self.facts["data"] = type(data).__name__
            self.facts["palette"] = [list(color) for color in getattr(data, "palette", ())]

    def _note_scores(self, split: str) -> None:
        scores = {
            name.removeprefix(f"{split}_"): value.item()
            for name, value in self.trainer.callback_metrics.items()
            if name.startswith(f"{split}_") and "_IoU_" not in name
        }
        if scores:
            self.facts["scores"] = {**self.facts.get("scores", {}), split: scores}

    # --- in and out of a folder ---------------------------------------------------------------

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write weights and arguments; `save_pretrained` adds the card.

        It leaves one that is there; one that it has written and nobody has changed makes room.
        """
        content: dict[str, Any] = {
            "state_dict": self.state_dict(),
            "hyper_parameters": dict(self.hparams),
        }
        self.on_save_checkpoint(content)
        tensors, others = dict(content["state_dict"]), {}
        for key, value in content.items():
            if key not in _NO_LOADER:
                tensors |= dict(_tensors(value, key))
                others[key] = _without_tensors(value)
        arguments = content["hyper_parameters"].items()
        config = {
            "method": type(self).__name__,
            "arguments": {k: v for k, v in arguments if not k.startswith("_")},
            "features": self.own_features,
            "checkpoint": others,
            "versions": versions(),
        }
        card = save_directory / "README.md"
        if card.is_file():
            *above, last = card.read_text(encoding="utf-8").strip().split("\n")
            if last == _seal("\n".join(above)):
                card.unlink()
        text = json.dumps(config, indent=2, ensure_ascii=False, default=_path)
        copies = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        replace_file(save_directory / _WEIGHTS, save(copies))
        replace_file(save_directory / _CONFIG, text.encode())

    @property
    def own_features(self) -> str | None:
        """Import path of the network that was given as `features`; None for one by name."""
        return None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **arguments: Any,
    ) -> Self:
        """Load what `save_pretrained` has written, in evaluation mode.

        Of a base such as `SegmentationModule` the method is that of the folder.

        Args:
            pretrained_model_name_or_path: a folder, or `user/repository` on the Hugging Face hub.
            force_download: as in huggingface_hub, like the next four.
            token: for private repositories.
            cache_dir: where downloads are kept.
            local_files_only: download nothing.
            revision: branch, tag or commit.
            **arguments: of the method, in place of the saved ones, such as `anomaly_score`.

        Raises:
            MissingFileError: the folder is not one of `save_pretrained`.
            DownloadError: the hub has no such model, or cannot be reached.
            GenSegError: it is another method, or has a network of its own, which `arguments` lack.
        """
        place = Path(pretrained_model_name_or_path)
        options = {
            "force_download": force_download,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "revision": revision,
        }
        files = [_file(place, name, options) for name in (_CONFIG, _WEIGHTS)]
        config = json.loads(files[0].read_text(encoding="utf-8"))
        if "method" not in config or "checkpoint" not in config:
            raise GenSegError(
                f"'{place}' holds a model of another library: give one that save_pretrained of "
                "lightning_genseg has written."
            )
        kind = subclass_named(cls, config["method"])
        if kind is None:
            raise GenSegError(
                f"'{place}' holds a {config['method']}, which is no {cls.__name__}: use "
                f"{config['method']}.from_pretrained, and import its class before."
            )
        if config["features"] is not None and "features" not in arguments:
            raise GenSegError(
                f"'{place}' was saved with a network of its own, {config['features']}, which is "
                "not in it: build the network and give it to from_pretrained as features."
            )
        refuse_foreign_arguments(kind, config["arguments"], arguments)
        model = kind(**{**config["arguments"], **arguments})
        checkpoint = {**config["checkpoint"], "hyper_parameters": config["arguments"]}
        state: dict[str, Any] = {}
        for key, tensor in load_file(files[1]).items():
            *way, name = key.split(_SEPARATOR)
            target = state
            for step in way:
                target = (checkpoint if target is state else target).setdefault(step, {})
            target[name] = tensor
        checkpoint["state_dict"] = state
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(state)
        return model.eval()

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """A card of what is known: classes, scores, thresholds, data, command, versions."""
        name = type(self).__name__
        metadata = ModelCardData(
            library_name="lightning-genseg",
            pipeline_tag="image-segmentation",
            tags=["lightning", "semantic-segmentation", name.lower()],
        )
        text = "\n\n".join(_card(self))
        card = str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}\n"))
        return ModelCard(f"{card}\n{_seal(card)}\n")


def _file(place: Path, name: str, options: Mapping[str, Any]) -> Path:
    if place.is_dir():
        if not (place / name).is_file():
            raise MissingFileError(
                f"there is no {name} in '{place}': give a folder that save_pretrained has written."
            )
        return place / name
    try:
        return Path(hf_hub_download(place.as_posix(), name, **options))
    except (HfHubHTTPError, EntryNotFoundError, HFValidationError, ConnectionError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".:")
        raise DownloadError(
            f"'{place}' is no folder, and {name} could not be had from the Hugging Face hub "
            f"({reason}): correct the name, or save the model to a folder."
        ) from error


def _seal(card: str) -> str:
    """The last line of a card, by which `_save_pretrained` sees whether anyone has changed it."""
    digest = hashlib.sha256(card.strip().encode()).hexdigest()[:16]
    return f"<!-- save_pretrained writes this card anew until you change it: {digest} -->"


def subclass_named(base: type[Method], name: str) -> type[Method] | None:
    """The class of that name, `base` itself or below it; no module is imported for it."""
    if base.__name__ == name:
        return base
    return next(
        (found for kind in base.__subclasses__() if (found := subclass_named(kind, name))), None
    )


def _tensors(value: Any, way: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield way, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _tensors(part, f"{way}{_SEPARATOR}{key}")


def _without_tensors(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {k: _without_tensors(v) for k, v in value.items() if not isinstance(v, Tensor)}


def _in_words(value: Any) -> Any:
    """A fact as a checkpoint and JSON hold it: numbers, lists, mappings, words for the rest."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, Mapping):
        keys = (key if isinstance(key, str | int | float) else str(key) for key in value)
        return dict(zip(keys, map(_in_words, value.values()), strict=True))
    if isinstance(value, list | tuple | set):
        return [_in_words(part) for part in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _path(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{value!r} is no plain value")


def versions() -> dict[str, str]:
    """Of this package and those that a result depends on."""
    from lightning_genseg import __version__  # whose import is the one of this module

    return {
        "lightning_genseg": __version__,
        "lightning": lightning.__version__,
        "torch": str(torch.__version__),
    }


def _card(model: Any) -> Iterator[str]:
    """Paragraphs of a model card."""
    name, facts = type(model).__name__, dict(model.facts)
    summary = re.split(r"\n\s*\n", type(model).__doc__ or "")[0].strip()
    yield f"# {name}: {len(model.all_class_names)} classes\n\n{summary}"
    own = ", features=network" if model.own_features else ""
    yield (
        f"```python\nfrom lightning_genseg import {name}\n\n"
        f'model = {name}.from_pretrained("PATH_OR_REPOSITORY"{own})\n'
        'prediction = model.predict_image(array)  # H x W x 3, uint8: "mask", "scores", ...\n```'
    )
    if model.own_features:
        yield f"`network` is a `{model.own_features}`, whose code is not in this repository."
    palette = facts.pop("palette", None) or []
    rows = ["## Classes\n\n| number | name | colour |\n|---|---|---|"]
    for index, label in enumerate(model.all_class_names):
        color = "#{:02x}{:02x}{:02x}".format(*palette[index]) if index < len(palette) else ""
        rows.append(f"| {index} | {label} | {color} |")
    yield "\n".join(rows)
    scores = facts.pop("scores", {})
    if scores:
        rows = ["## Scores\n\n| split | score | value |\n|---|---|---|"]
        rows += [f"| {s} | {k} | {v:.4f} |" for s, part in scores.items() for k, v in part.items()]
        yield "\n".join(rows)
    score, thresholds = (getattr(model, key, None) for key in ("anomaly_score", "anomaly"))
    if score is not None:
        threshold = thresholds.thresholds.get(score) if thresholds is not None else None
        promise = "There is no threshold: the model is not calibrated."
        if threshold is not None:
            promise = f"Its threshold is {threshold.value:.6g}. {threshold.promise()}."
        yield f"## Anomalies\n\nThe score is `{score}`; higher is stranger. {promise}"
    command = facts.pop("command", None)
    if command is not None:
        yield f"## Training\n\n```bash\n{command}\n```"
    facts |= versions()
    yield "## Facts\n\n| | |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in facts.items())
