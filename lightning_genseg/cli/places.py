"""Where a command writes: a fit into a folder of its own, everything else into that of its fit."""

import csv
import io
import os
import re
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_genseg.cli.messages import say
from lightning_genseg.errors import GenSegError, MissingFileError, did_you_mean, listed
from lightning_genseg.files import replace_file

_FOLDERS = {"predict": "predictions"}  # of the other commands: their names


def name_run(config: Any) -> None:
    """Put the run's name into the logger's folders; the saved configuration then names them."""
    arguments = getattr(config.trainer.logger, "init_args", {})
    files = [Path(str(file)) for file in config.get("config") or () if file is not None]
    folder = files[0].parent.name if files else ""
    if folder == "..":
        folder = files[0].resolve().parent.name
    name = files[0].stem if files else config.model.class_path.rpartition(".")[2]
    if "{folder}" in str(arguments.get("save_dir")):
        root = Path(config.trainer.default_root_dir or "")
        arguments["save_dir"] = str(root / arguments["save_dir"].replace("{folder}", folder))
    if arguments.get("name") == "{config}":
        arguments["name"] = name


def place_run(config: Any, command: str) -> None:
    """Let a resumed fit go on in its folder, and give other commands one inside that of the fit.

    ``RUN/test`` for a checkpoint of ``RUN``, or the first of ``RUN/test_1`` ... that is free.
    Predictions go to their `output_dir`. A version that the user gives stays, unless it is a fit's.

    Raises:
        GenSegError: a fit would write over another one.
    """
    logger = config.trainer.logger
    arguments = getattr(logger, "init_args", None)
    if arguments is None or not str(logger.class_path).endswith("CSVLogger"):
        return
    base, version = Path(arguments.save_dir) / (arguments.name or ""), arguments.version
    run = _run_of(config.get("ckpt_path"))
    if run is not None and run.parent.resolve() != base.resolve():
        run = None
    resumed = run
    if version is not None:
        given = base / (f"version_{version}" if isinstance(version, int) else str(version))
        run = given if _is_fit(given) else None
    if command == "fit":
        if version is None and run is not None:
            match = re.fullmatch(r"version_(\d+)", run.name)
            arguments.version = int(match[1]) if match else run.name
        elif run is not None and not config.trainer.fast_dev_run:
            goes_on = resumed is not None and resumed.resolve() == run.resolve()
            # Of a requeued job on a cluster, from which Lightning goes on by itself.
            goes_on |= any(Path(config.trainer.default_root_dir or "").glob("hpc_ckpt_*.ckpt"))
            if not goes_on and any(run.glob("checkpoints/*.ckpt")):
                raise GenSegError(
                    f"'{run}' holds a training already: go on with it (--ckpt_path last), or give "
                    "another --trainer.logger.init_args.version (null: the next free one)."
                )
        return
    writer = config.predictions if command == "predict" else None
    if version is not None and run is None:
        return
    folder = None if writer is None else writer.output_dir
    if folder is None:
        name = _FOLDERS.get(command, command)
        again = writer is not None and (writer.resume or writer.overwrite)
        folder = (run or base) / name
        number = 0
        while folder.exists() and not again:
            number += 1
            folder = folder.with_name(f"{name}_{number}")
    folder = Path(folder)
    if writer is not None:  # a logger would empty a log that lies there
        writer.output_dir, config.trainer.default_root_dir = folder, str(folder)
        config.trainer.logger = False
        return
    arguments.save_dir, arguments.name = str(folder.parent), ""
    arguments.version = folder.name


def find_checkpoint(config: Any, command: str) -> str | Path:
    """The path that `--ckpt_path` means; Lightning would pass over a `last` that is not there.

    Raises:
        GenSegError: a word for which there is no file.
    """
    word = config.ckpt_path
    if str(word) == "best":
        raise GenSegError(
            "--ckpt_path best is known only to the process that trained: give the path."
        )
    if str(word) not in ("last", "hpc"):
        path: str | Path = word
        if ":" not in str(path) and not os.path.lexists(path):  # before a folder is made
            others = [str(other) for other in Path(path).parent.glob("*.ckpt")]
            raise MissingFileError(
                f"checkpoint '{path}' does not exist{did_you_mean(str(path), others)}"
            )
        return path
    name_run(config)
    root = Path(config.trainer.default_root_dir or "")
    folders = [root]
    if word == "last":
        logger = getattr(config.trainer.logger, "init_args", None) or {}
        version, name = logger.get("version"), logger.get("name")
        folders = [root / "checkpoints"]
        if logger.get("save_dir") is not None and isinstance(name, str):
            pattern = f"version_{'*' if version is None else version}"
            runs = Path(logger["save_dir"], name)
            named = runs.glob(version if isinstance(version, str) else pattern)
            folders = [run / "checkpoints" for run in named] or [runs]
        callbacks = config.trainer.callbacks or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        given = [(getattr(one, "init_args", None) or {}).get("dirpath") for one in callbacks]
        folders = [Path(folder) for folder in given if folder] or folders
    pattern = "last*.ckpt" if word == "last" else "hpc_ckpt_*.ckpt"
    found = [path for folder in folders for path in folder.glob(pattern)]
    if not found:
        raise GenSegError(
            f"--ckpt_path {word}: there is no {pattern} in {listed(folders)}; give the path"
            f"{', or leave it out to start anew' if command == 'fit' else ''}."
        )
    path = max(found, key=lambda path: path.stat().st_mtime)
    say(f"--ckpt_path {word} is {path}")
    return path


def go_on(logger: Any, step: int) -> None:
    """Keep the log of a fit up to the step from which it goes on: CSVLogger would empty it."""
    path = Path(getattr(logger, "log_dir", None) or "") / "metrics.csv"
    first = not getattr(rank_zero_only, "rank", None)
    if not isinstance(logger, CSVLogger) or not first or not path.is_file():
        return
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if _is_before(row, step)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Experiment logs directory")
        writer = logger.experiment
    if rows:
        writer.metrics_keys = list(rows[0])
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, writer.metrics_keys)
        table.writeheader()
        table.writerows(rows)
        replace_file(path, text.getvalue().encode())


def _is_before(row: dict[str, str], step: int) -> bool:
    """Whether a row was logged before a checkpoint of `step` was written, at a validation."""
    logged = row.get("step") or ""
    if not logged.isdecimal() or None in row:  # torn by a full disk or a loss of power
        return False
    validated = any(value for key, value in row.items() if key.startswith("val_"))
    return int(logged) < step + validated


def _run_of(checkpoint: str | Path | None) -> Path | None:
    """Folder of the fit that has written ``RUN/checkpoints/NAME.ckpt``."""
    folder = Path(checkpoint or "").parent
    return folder.parent if folder.name == "checkpoints" and _is_fit(folder.parent) else None


def _is_fit(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()
