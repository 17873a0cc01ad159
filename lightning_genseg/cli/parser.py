"""Parsers with readable help, and those of the commands that read data without a model."""

import re
from argparse import SUPPRESS, Action
from collections.abc import Callable, Iterable
from typing import Any

from jsonargparse import DefaultHelpFormatter, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from lightning_genseg import data

_LONGEST_LIST = 40  # classes
_LIGHTNINGS = ("ckpt_path", "weights_only", "verbose")
_TRAINER_OPTIONS = [
    "accelerator",
    "devices",
    "num_nodes",
    "strategy",
    "precision",
    "sync_batchnorm",
    "max_epochs",
    "max_steps",
    "max_time",
    "overfit_batches",
    "fast_dev_run",
    "limit_train_batches",
    "limit_val_batches",
    "limit_test_batches",
    "limit_predict_batches",
    "val_check_interval",
    "check_val_every_n_epoch",
    "num_sanity_val_steps",
    "log_every_n_steps",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "logger",
    "callbacks",
    "default_root_dir",
    "enable_checkpointing",
    "enable_progress_bar",
]  # the others are parsed, but not listed
_CLASSES = "Classes and groups have a help of their own: --model.optimizer.help SGD."
TRAINER_EPILOG = f"""{_CLASSES}
Of the Trainer's arguments the common ones are listed. All of them:
https://lightning.ai/docs/pytorch/stable/common/trainer.html#trainer-flags"""
# What a configuration file may hold beside `data`, and commands that only read data do not use.
_OF_OTHER_COMMANDS = [
    "seed_everything",
    "trainer",
    "model",
    "report",
    "predictions",
    "ckpt_path",
    "weights_only",
    "verbose",
    "output",
    "false_positive_rate",
    "level",
    "risk",
]


class HelpFormatter(DefaultHelpFormatter):
    """jsonargparse's help without what fills screens.

    These are the lists of all subclasses of `nn.Module` and of albumentations' transforms, a usage
    of more than a few options, the Trainer's rarely used options, and all but the first sentence
    that Lightning says of anything. Only what argparse's own formatters override is overridden.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"max_help_position": 8, **kwargs})  # type: ignore[no-untyped-call]

    def start_section(self, heading: str | None) -> None:
        """Begin with a capital: a group's heading is the sentence that describes its argument."""
        super().start_section(heading and heading[0].upper() + heading[1:])

    def add_usage(
        self, usage: str | None, actions: Iterable[Action], *args: Any, **kwargs: Any
    ) -> None:
        """Leave out the options where they are many."""
        short = usage is None and len(list(actions)) > 8
        super().add_usage("%(prog)s [options]" if short else usage, actions, *args, **kwargs)

    def add_argument(self, action: Action) -> None:
        """Leave out the Trainer's rarely used options, and those that print the help of a class."""
        group, _, name = action.dest.partition(".")
        rare = group == "trainer" and name.partition(".")[0] not in ("", *_TRAINER_OPTIONS)
        if not rare and not name.endswith(".help"):
            super().add_argument(action)

    def _get_help_string(self, action: Action) -> str:
        whole = action.help
        command = not action.option_strings
        if command or action.dest.startswith("trainer.") or action.dest in _LIGHTNINGS:
            action.help = re.split(r"(?<=[^.\s]\.)\s+(?=[A-Z`])", whole or "")[0]
        try:
            text = super()._get_help_string(action)
        finally:
            action.help = whole
        if str(action.metavar).startswith("{"):  # the choices are seen already
            text = text.replace("type: %(type)s, ", "")
        listed: str = getattr(action, "extra_help", str)()
        names = dict.fromkeys(path.rpartition(".")[2] for path in listed.split(", ")[1:])
        known = f", known: {', '.join(names)}" if 0 < len(names) <= _LONGEST_LIST else ""
        return text.replace(listed, known) if listed else text


class _CommandsFormatter(HelpFormatter):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"max_help_position": 20, **kwargs})  # in two columns


class Parser(LightningArgumentParser):
    """Lightning's parser with our help; it raises errors, so that `main` prints them in one way."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        options = {"formatter_class": HelpFormatter, "exit_on_error": False, "epilog": _CLASSES}
        super().__init__(*args, **{**options, **kwargs})

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Put the names of commands beside what they do."""
        if hasattr(self, "commands"):
            self.formatter_class = _CommandsFormatter
        return super().format_help(*args, **kwargs)

    def add_subcommands(self, *args: Any, **kwargs: Any) -> Any:
        """Keep what the commands can be added to: Lightning adds its own, and then we add ours."""
        self.commands = super().add_subcommands(*args, **kwargs)
        return self.commands


def data_parser(command: str, function: Callable[..., Any], description: str) -> Parser:
    """Parser of a command that calls `function` with data and needs neither Trainer nor model.

    It takes the configuration files of the other commands, and passes over what it does not use.
    """
    parser = Parser(prog=f"genseg {command}", description=description)
    parser.add_argument("-c", "--config", action="config", help="YAML file, as for fit.")
    parser.add_lightning_class_args(data.SegmentationDataModule, "data", subclass_mode=True)
    parser.add_function_arguments(function, skip={"data"})
    for key in _OF_OTHER_COMMANDS:
        parser.add_argument(f"--{key}", type=Any, help=SUPPRESS)
    return parser


def data_arguments(parser: Parser, config: Namespace) -> dict[str, Any]:
    """Return the arguments of the function of a `data_parser`, with the datamodule built."""
    for key in (*_OF_OTHER_COMMANDS, "config"):
        config.pop(key, None)
    arguments: dict[str, Any] = vars(parser.instantiate(config))
    return arguments
