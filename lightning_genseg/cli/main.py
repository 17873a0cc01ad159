"""The command ``genseg``: a plain LightningCLI in subclass mode."""

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero

# As packages: this is what makes their classes known by their short names.
from lightning_genseg import __version__, data, methods
from lightning_genseg.arguments import arguments_of, check_arguments
from lightning_genseg.callbacks.last_checkpoint import LastCheckpoint
from lightning_genseg.callbacks.predictions import PredictionWriter
from lightning_genseg.callbacks.report import Report
from lightning_genseg.cli import (
    add_class,
    check,
    convert_dalle,
    convert_masks,
    export,
    reconstruct,
)
from lightning_genseg.cli.calibrate import GenSegTrainer
from lightning_genseg.cli.messages import fail, say, user_message
from lightning_genseg.cli.parser import TRAINER_EPILOG, Parser
from lightning_genseg.cli.places import find_checkpoint, go_on, name_run, place_run
from lightning_genseg.errors import GenSegError
from lightning_genseg.methods.checkpoints import (
    class_named,
    need_weights_only,
    read_run,
    refuse_foreign_arguments,
)

# What a run does unless it is told otherwise, in YAML or on the command line. `GenSegCLI` fills in
# what a fixed value cannot say: where the log goes, and what validation is counted in.
_TRAINER_DEFAULTS: dict[str, Any] = {
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,  # `genseg check` reads all data, not only two batches
    "check_val_every_n_epoch": None,  # a whole val_check_interval counts steps, not epochs
    "logger": {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": "runs/{folder}", "name": "{config}"},
    },
}
_FIT = """Train a model.

Unless told otherwise, a run writes into runs/FOLDER/NAME/version_N, after the first configuration
file FOLDER/NAME.yaml (without one: after the model). It logs every 10 steps, and validates every
epoch, or every val_check_interval steps if that is a whole number. Each validation replaces
checkpoints/last.ckpt, unless there is a ModelCheckpoint among the callbacks."""

_PREDICT = "Write masks, overlays and anomaly maps of the images that the data name for prediction."

_RESULTS = {"fit": "the model, its scores and pictures", "predict": "masks and pictures"}

_COMMANDS: dict[str, Any] = {
    "check": check.COMMAND,
    "convert-masks": convert_masks.COMMAND,
    "reconstruct": reconstruct.COMMAND,
    "add-class": add_class.COMMAND,
    "export": export.COMMAND,
    "convert-dalle": convert_dalle.COMMAND,
}


class GenSegCLI(LightningCLI):
    """Links what the data know about their classes into the model; writes scores and pictures."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = kwargs.get("args")
        self._words: list[str] = sys.argv[1:] if given is None else given
        super().__init__(*args, **kwargs)

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """List the commands without a Trainer beside Lightning's; `main` runs them."""
        super().setup_parser(*args, **kwargs)
        assert isinstance(self.parser, Parser)
        for name, command in _COMMANDS.items():
            self.parser.commands.add_subcommand(
                name, self.init_parser(), help=command.help.splitlines()[0]
            )

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        # To find out the arguments of one command takes a tenth of a second, and one is run.
        if subcommand not in self._words and not self.subcommands().keys().isdisjoint(self._words):
            return self.init_parser(**kwargs)
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's and `calibrate`; ``predict`` writes its results and keeps none in memory."""
        commands = LightningCLI.subcommands()
        commands["predict"].add("return_predictions")
        commands["calibrate"] = {"model", "datamodule"}
        return commands

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks that every run has; a model without a linked argument ignores it."""
        parser.add_lightning_class_args(Report, "report")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        for name in ("num_classes", "ignore_index", "class_names"):
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Refuse a group that is null and a seed that NumPy would refuse.

        The command line is kept for the model card.
        """
        self.command = shlex.join(["genseg", *self._words])
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
        known = arguments_of(_imported(config.model.class_path))
        for name, value in (config.model.get("init_args") or {}).items():
            if value is None and name in known and is_dataclass(known[name].default):
                raise GenSegError(
                    f"model.{name} is null, but it is a group of arguments: leave it out, or give "
                    "some of them."
                )
        seed = config.get("seed_everything")
        if not isinstance(seed, bool):
            check_arguments(main, {"seed": seed}, seed="[0, 4294967295]")

    def before_instantiate_classes(self) -> None:
        """A test or predict run in the folder of a fit must not replace the fit's files."""
        name = "config.yaml" if self.subcommand == "fit" else f"{self.subcommand}_config.yaml"
        self.save_config_kwargs = {"config_filename": name, "overwrite": True}
        name_run(self.config[self.subcommand])
        place_run(self.config[self.subcommand], str(self.subcommand))
        if self.subcommand != "fit":  # which is of no interest where nothing is saved
            warnings.filterwarnings("ignore", message="The dirpath has changed from")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Complete `_TRAINER_DEFAULTS` where they depend on the other arguments."""
        trainer = self._get(self.config_init, "trainer")
        interval = trainer.val_check_interval
        if trainer.check_val_every_n_epoch is None and (
            interval is None or isinstance(interval, float)
        ):
            kwargs["check_val_every_n_epoch"] = 1
        callbacks = trainer.callbacks or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if trainer.barebones:
            kwargs |= {"logger": None, "log_every_n_steps": None}
        elif trainer.enable_checkpointing is not False and not any(
            isinstance(callback, Checkpoint) for callback in callbacks
        ):
            kwargs["callbacks"] = [*callbacks, LastCheckpoint()]
        try:
            return super().instantiate_trainer(**kwargs)
        except (TypeError, ValueError) as error:  # Lightning's word on what does not fit together
            raise GenSegError(str(error)) from error

    def _require_checkpoint(self) -> None:
        """Random weights would look like a result."""
        if self.model.needs_training and not self.config[self.subcommand].get("ckpt_path"):
            raise GenSegError(
                f"genseg {self.subcommand} needs the trained model: give its checkpoint "
                "with --ckpt_path."
            )

    before_predict = before_test = before_validate = before_calibrate = _require_checkpoint

    def before_fit(self) -> None:
        """A resumed fit keeps its log; the model card tells how the model was trained."""
        self.model.facts["command"] = self.command
        path = self.config.fit.get("ckpt_path")
        if path is not None and Path(path).is_file():
            go_on(self.trainer.logger, read_run(path).get("global_step", 0))

    def _say_where(self) -> None:
        """End with a line on where the results are; `calibrate` has one of its own."""
        command, trainer = str(self.subcommand), self.trainer
        trial: int = trainer.fast_dev_run  # type: ignore[attr-defined]
        if trial or not trainer.is_global_zero:
            return
        folder = Path(getattr(trainer.logger, "log_dir", None) or trainer.default_root_dir)
        if command == "predict":
            folder = self.config.predict.predictions.output_dir or folder / "predictions"
        scored = command != "fit" or (folder / "val_metrics.json").exists()
        left = _RESULTS.get(command, "scores and pictures") if scored else "the model's checkpoints"
        say(f"{left} are in {folder}")

    after_fit = after_validate = after_test = after_predict = _say_where

    def predict(self, **kwargs: Any) -> None:
        """Predict without keeping anything: `PredictionWriter` has written it."""
        self.trainer.predict(**kwargs, return_predictions=False)
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(one, PredictionWriter) and one.unreadable for one in callbacks):
            self._say_where()
            raise SystemExit(1)

    def _parse_ckpt_path(self) -> None:
        """Let the checkpoint's hyper-parameters win over the YAML, and print which ones did.

        Lightning's own version prints nothing, and knows only checkpoints that its CLI has written:
        here one from a notebook or script does as well.
        """
        command = self.config.subcommand
        config = self.config[command]
        if not config.get("ckpt_path"):
            return
        need_weights_only(config.get("weights_only"))
        path = config.ckpt_path = find_checkpoint(config, str(command))
        saved = dict(read_run(path).get("hyper_parameters", {}))
        saved.pop("_instantiator", None)
        mine = config.model.class_path
        named = saved.pop("_class_path", mine)
        kind = class_named(named, _imported(mine))
        anew, sources = (getattr(kind, name, ()) for name in ("chosen_anew", "sources"))
        saved = {key: value for key, value in saved.items() if key not in anew}
        old = dict(_leaves("model", {"class_path": mine, **config.model.init_args}))
        new = {key: dict(_leaves(f"model.{key}", value)) for key, value in saved.items()}
        same = [key for key, leaves in new.items() if leaves.items() <= old.items()]
        refuse_foreign_arguments(kind, saved, same if named == mine else ())
        for key, leaves in {"class_path": {"model.class_path": named}, **new}.items():
            if key in sources and saved[key] is None:
                continue  # the weights are in the checkpoint, wherever they came from
            for name, value in leaves.items():
                if name in old and old[name] != value:
                    print(f"genseg: {path} sets {name} to {value}, not {old[name]}")
        model = {"class_path": named, "init_args": saved}
        self.config = self.parser.parse_object({command: {"model": model}}, self.config)


class _WayOn(Callback):
    """Tells how an interrupted training run goes on."""

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if not isinstance(exception, KeyboardInterrupt) or not trainer.is_global_zero:
            return
        if not trainer.training:
            say("interrupted.")
            return
        paths = [
            Path(getattr(callback, name, ""))
            for callback in trainer.checkpoint_callbacks
            for name in ("last_model_path", "best_model_path")
        ]
        paths = [path for path in paths if path.is_file()]
        if paths:
            newest = max(paths, key=lambda path: path.stat().st_mtime)
            say(f"interrupted; go on with the same command and --ckpt_path {newest}")
        else:
            say("interrupted before the first checkpoint was written.")


def main(args: list[str] | None = None) -> None:
    """Run ``genseg`` with the command line, or with `args`.

    Raises:
        SystemExit: with code 2 after one line ``genseg: error: ...`` for what the user can mend.
            Other errors keep their traceback, and so do all with ``GENSEG_DEBUG=1``.
    """
    _quiet()
    try:
        words = sys.argv[1:] if args is None else args
        if words and words[0] in _COMMANDS:
            _COMMANDS[words[0]].run(words[1:])
            return
        GenSegCLI(
            methods.TrainedModule,
            data.SegmentationDataModule,
            trainer_class=GenSegTrainer,
            trainer_defaults={**_TRAINER_DEFAULTS, "callbacks": [_WayOn()]},
            seed_everything_default=0,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,  # the modules take their optimiser as an argument
            parser_class=Parser,
            parser_kwargs={
                "prog": "genseg",
                "description": "Generative semantic segmentation, from data to predictions.",
                "epilog": None,
                "version": __version__,
                **{name: {"epilog": TRAINER_EPILOG} for name in GenSegCLI.subcommands()},
                "fit": {"description": _FIT, "epilog": TRAINER_EPILOG},
                "predict": {"description": _PREDICT, "epilog": TRAINER_EPILOG},
            },
            args=args,
        )
    except KeyboardInterrupt:  # before the Trainer runs; later it is _WayOn's
        say("interrupted.")
        raise SystemExit(130) from None
    except Exception as error:
        message = None if os.environ.get("GENSEG_DEBUG") else user_message(error)
        if message is None:
            raise
        fail(message)


def _imported(class_path: str) -> type:
    """The class that a parser has imported already."""
    module, _, name = class_path.rpartition(".")
    kind: type = getattr(sys.modules[module], name)
    return kind


def _quiet() -> None:
    """Leave out what other packages say about themselves."""
    # lightning 2.6 against torch >= 2.14
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    logging.getLogger(rank_zero.__name__).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return "Tip: For seamless cloud" not in message and "`weights_only` was not set" not in message


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of an argument, or of all in a group, as YAML would hold them."""
    value = value.as_dict() if isinstance(value, Namespace) else value
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _leaves(f"{key}.{name}", part)
    else:
        plain = list(value) if isinstance(value, tuple) else value
        yield key, str(value) if isinstance(value, Path) else plain
