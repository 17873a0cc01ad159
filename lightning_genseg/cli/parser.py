"""Parsers whose help a person can read, and commands that read data without a model."""

import re
from argparse import SUPPRESS, Action
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import yaml  # type: ignore[import-untyped]
from jsonargparse import DefaultHelpFormatter, get_loader, set_loader
from lightning.pytorch.cli import LightningArgumentParser
from yaml import MappingNode, SequenceNode, YAMLError

from lightning_genseg import data
from lightning_genseg.errors import GenSegError
from lightning_genseg.files import read_text

_LIGHTNINGS = ("ckpt_path", "weights_only", "verbose")
_TRAINER_OPTIONS = """
    accelerator devices num_nodes strategy precision sync_batchnorm
    max_epochs max_steps max_time overfit_batches fast_dev_run
    limit_train_batches limit_val_batches limit_test_batches limit_predict_batches
    val_check_interval check_val_every_n_epoch num_sanity_val_steps log_every_n_steps
    accumulate_grad_batches gradient_clip_val logger callbacks default_root_dir
    enable_checkpointing enable_progress_bar
"""  # the others are parsed, but not listed
_CLASSES = "Further classes and groups: --model.help GMMSeg --model.optimizer.help SGD"
TRAINER_EPILOG = f"""{_CLASSES}.
Of the Trainer's arguments the common ones are listed. All of them:
https://lightning.ai/docs/pytorch/stable/common/trainer.html#trainer-flags"""
# What a configuration file may hold beside `data`, and commands that only read data do not use.
_OF_OTHER_COMMANDS = """
    seed_everything trainer model report predictions ckpt_path weights_only verbose
    output false_positive_rate level risk
"""

# YAML takes `0:0` for a word and `255:1` for a time of day.
_TABLE = re.compile(r"\{(?:\s*-?\d+\s*:\s*-?\d+\s*(?:,|(?=\})))+\s*\}")
_load_yaml = get_loader("yaml")


def _load(stream: str) -> Any:
    """Load YAML in which a table of numbers, `{0:0,255:1}`, needs no spaces, and `None` is null.

    jsonargparse passes a null for an option of a group on as the word `None`.
    """
    if stream.strip() == "None":
        return None
    return _load_yaml(_TABLE.sub(lambda table: table[0].replace(":", ": "), stream))


set_loader("yaml", _load, exceptions=(YAMLError, ValueError, RecursionError))


def _key_twice(node: Any) -> Any:
    """The second of two equal keys of a mapping, anywhere in a YAML file, if there are any."""
    known: set[str] = set()
    parts = []
    for part in node.value if isinstance(node, MappingNode | SequenceNode) else ():
        key, value = part if isinstance(part, tuple) else (None, part)
        if key is not None and isinstance(key.value, str):
            if key.value in known:
                return key
            known.add(key.value)
        parts.append(value)
    return next((key for key in map(_key_twice, parts) if key is not None), None)


class HelpFormatter(DefaultHelpFormatter):
    """jsonargparse's help without what fills screens.

    Left out are all subclasses of `nn.Module` and of albumentations' transforms, a long usage, the
    Trainer's rarely used options, and all but the first sentence of Lightning's texts. There is no
    setting for that; overridden are methods that argparse's own formatters override too.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs = {"max_help_position": 6, **kwargs}
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]

    def start_section(self, heading: str | None) -> None:
        """Begin with a capital: a group's heading is the sentence that describes its argument."""
        super().start_section(heading and heading[0].upper() + heading[1:])

    def add_usage(
        self, usage: str | None, actions: Iterable[Action], *args: Any, **kwargs: Any
    ) -> None:
        """Leave out the options where they are many, and all of it in the help of a class."""
        actions = list(actions)
        short = usage is None and len(actions) > 8
        if any("--help" in action.option_strings for action in actions):
            super().add_usage("%(prog)s [options]" if short else usage, actions, *args, **kwargs)

    def add_argument(self, action: Action) -> None:
        """Leave out the Trainer's rarely used options, and those that print the help of a class."""
        group, _, name = action.dest.partition(".")
        rare = group == "trainer" and name.partition(".")[0] not in ("", *_TRAINER_OPTIONS.split())
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
        choices = str(action.metavar).startswith("{")  # they are seen already
        text = text.replace("type: %(type)s, " if choices else "type: ", "")
        listed: str = getattr(action, "extra_help", str)()
        paths = listed.removeprefix(", known subclasses: ").split(", ")
        foreign = any(path.startswith(("torch.", "albumentations.")) for path in paths)
        names = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in paths))
        return text.replace(listed, "" if foreign else f", known: {names}") if listed else text

    def _expand_help(self, action: Action) -> str:
        text = super()._expand_help(action).replace("<class 'Path'>", "Path")
        # The class of an optimiser is given, not a function.
        return re.sub(r"Callable\[\[\w+\], ([^()]*)\]\]", r"\1]", text)


class _CommandsFormatter(HelpFormatter):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"max_help_position": 20, **kwargs})  # in two columns


class Parser(LightningArgumentParser):
    """Lightning's parser with our help; it raises errors, which `main` prints in one way."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        options = {"formatter_class": HelpFormatter, "exit_on_error": False, "epilog": _CLASSES}
        super().__init__(*args, **{**options, **kwargs})

    def parse_path(self, cfg_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Parse a configuration file; a GenSegError if it is no YAML, empty, or has a key twice."""
        text = read_text(str(cfg_path), "the configuration")
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except (YAMLError, RecursionError) as error:
            reason = " ".join(str(error).replace('in "<unicode string>", ', "").split())
            raise GenSegError(
                f"the configuration '{cfg_path}' is no YAML ({reason}): correct it."
            ) from error
        if root is None:
            raise GenSegError(f"the configuration '{cfg_path}' is empty: write options into it.")
        twice = _key_twice(root)
        if twice is not None:
            raise GenSegError(
                f"the configuration '{cfg_path}' has '{twice.value}' twice, again in line "
                f"{twice.start_mark.line + 1}: bring both together."
            )
        return super().parse_path(cfg_path, *args, **kwargs)

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Put the names of commands beside what they do."""
        if hasattr(self, "commands"):
            self.formatter_class = _CommandsFormatter
        return super().format_help(*args, **kwargs)

    def add_subcommands(self, *args: Any, **kwargs: Any) -> Any:
        """Keep what the commands can be added to: Lightning adds its own, and then we add ours."""
        self.commands = super().add_subcommands(*args, prog=self.prog, **kwargs)
        return self.commands


@dataclass(frozen=True)
class FunctionCommand:
    """A command that calls a function with its arguments, and needs neither Trainer nor data.

    Args:
        name: `genseg <name>`.
        function: whose arguments are the command's.
        help: what the command does; its first line stands in the list of commands.
        tell: takes the arguments and what the function has returned; says it to the user.
        positional: whether arguments without a default are given without their names.
    """

    name: str
    function: Callable[..., Any]
    help: str
    tell: Callable[[dict[str, Any], Any], None]
    positional: bool = False

    def make_parser(self) -> Parser:
        """Parser of the command."""
        parser = Parser(prog=f"genseg {self.name}", description=self.help, epilog=None)
        parser.add_argument("-c", "--config", action="config", help="YAML file of these options.")
        parser.add_function_arguments(self.function, as_positional=self.positional)
        return parser

    def run(self, words: list[str]) -> None:
        """Run it with words of the command line."""
        parser = self.make_parser()
        arguments: dict[str, Any] = vars(parser.instantiate(parser.parse_args(words)))
        arguments.pop("config")
        self.tell(arguments, self.function(**arguments))


@dataclass(frozen=True)
class DataCommand:
    """A command that calls a function with data, and needs neither Trainer nor model.

    It takes the configuration files of the other commands, and passes over what it does not use.

    Args:
        name: `genseg <name>`.
        function: takes `data` and `output_dir`; returns a report.
        summary: text of a report for the screen.
        help: what the command does.
        of_model: arguments that a configuration's model gives unless they are given.
    """

    name: str
    function: Callable[..., dict[str, Any]]
    summary: Callable[[dict[str, Any]], str]
    help: str
    of_model: tuple[str, ...] = ()

    def make_parser(self) -> Parser:
        """Parser of the command."""
        parser = Parser(prog=f"genseg {self.name}", description=self.help)
        parser.add_argument("-c", "--config", action="config", help="YAML file, as for fit.")
        parser.add_lightning_class_args(data.SegmentationDataModule, "data", subclass_mode=True)
        parser.add_function_arguments(self.function, skip={"data"})
        for key in _OF_OTHER_COMMANDS.split():
            parser.add_argument(f"--{key}", type=Any, help=SUPPRESS)
        return parser

    def run(self, words: list[str]) -> None:
        """Run it with words of the command line; `GenSegError` if it reports problems."""
        parser = self.make_parser()
        if self.of_model:
            wrong = next((word for word in words if word.startswith("--model.")), None)
            if wrong is not None:
                raise GenSegError(
                    f"genseg {self.name} builds no model: leave {wrong.split('=')[0]} out; what it "
                    f"needs of one are {', '.join(f'--{key}' for key in self.of_model)}."
                )
            model = (parser.parse_args(words).get("model") or {}).get("init_args", {})
            parser.set_defaults({key: model[key] for key in self.of_model if key in model})
        config = parser.parse_args(words)
        for key in (*_OF_OTHER_COMMANDS.split(), "config"):
            config.pop(key, None)
        arguments = vars(parser.instantiate(config))
        report, folder = self.function(**arguments), arguments["output_dir"]
        print(f"{self.summary(report)}\n\nthe report is in {folder}")
        if report.get("problems"):
            raise GenSegError(
                f"{len(report['problems'])} problems with the data, all listed in the report in "
                f"{folder}."
            )
