"""`python -m workloads.training --dataset DIR --home DIR`: train, with progress as JSON lines on stdout."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import msgspec

from workloads.data.cleaning import CatalogueError
from workloads.data.dataset import DatasetError
from workloads.data.events import EventLogError
from workloads.telemetry.progress import Progress
from workloads.training.checkpoints import BusyError
from workloads.training.job import METRICS, DatasetTooSmallError, TrainingConfig, train

EXIT_FAULT = 2

_PREPARE = "prepare the data again with `python -m workloads.data`"


class _SettingError(ValueError):
    """An option out of range."""


_REMEDIES: dict[type[Exception], str] = {
    _SettingError: "see `python -m workloads.training --help`",
    DatasetTooSmallError: "give a log of more people over a longer time",
    BusyError: "wait for it, or end it and start again: it goes on where it stopped",
    DatasetError: _PREPARE,
    EventLogError: _PREPARE,
    CatalogueError: _PREPARE,
    OSError: "check the path, its rights and the disk",
}
"""Faults that a person can mend, and how; anything else is a bug and keeps its traceback."""


class _StoppedError(BaseException):
    """A signal asked the job to end; a BaseException, so that clean-up runs and nothing swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _stop(number: int, frame: FrameType | None) -> None:
    del frame
    raise _StoppedError(number)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    defaults = TrainingConfig()
    parser = argparse.ArgumentParser(prog="python -m workloads.training", description=__doc__)
    parser.add_argument("--dataset", type=Path, required=True, help="a directory that `python -m workloads.data` made")
    parser.add_argument("--home", type=Path, required=True, help="the product's state directory, .rankbridge")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="what all chance comes from")
    parser.add_argument("--rounds", type=int, help=f"rounds of the towers' first fit ({defaults.towers.rounds})")
    parser.add_argument("--epochs", type=int, help=f"passes of the ranker, at most ({defaults.ranker.epochs})")
    parser.add_argument("--slices", type=int, help=f"spans of time the ranker learns from ({defaults.slices})")
    parser.add_argument("--threads", type=int, help=f"threads of torch ({defaults.threads})")
    parser.add_argument("--small", action="store_true", help="a fraction of the work, for trying things out")
    parser.add_argument("--reuse", action="store_true", help="take a finished run of the same data and settings")
    return parser.parse_args(argv)


def _config(arguments: argparse.Namespace) -> TrainingConfig:
    for name in ("rounds", "epochs", "slices", "threads"):
        value = getattr(arguments, name)
        if value is not None and not 1 <= value <= 1000:
            raise _SettingError(f"--{name} {value}: must be 1 to 1000")
    if not 0 <= arguments.seed < 2**31:
        raise _SettingError(f"--seed {arguments.seed}: must be 0 to {2**31 - 1}")
    config = TrainingConfig(seed=arguments.seed)
    if arguments.small:
        config = config.small()
    replace = msgspec.structs.replace
    if arguments.rounds is not None:
        config = replace(config, towers=replace(config.towers, rounds=arguments.rounds))
    if arguments.epochs is not None:
        config = replace(config, ranker=replace(config.ranker, epochs=arguments.epochs))
    if arguments.slices is not None:
        config = replace(config, slices=arguments.slices)
    if arguments.threads is not None:
        config = replace(config, threads=arguments.threads)
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; 0, 2 for a fault (told as a `fault` line), 128 + the signal that ended it."""
    arguments = _arguments(argv)
    progress = Progress()
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _stop)
        made = train(arguments.dataset, arguments.home, _config(arguments), progress, reuse=arguments.reuse)
    except _StoppedError as stopped:
        return 128 + stopped.number
    except tuple(_REMEDIES) as error:
        progress.fault(_sentence(error), next(text for kind, text in _REMEDIES.items() if isinstance(error, kind)))
        return EXIT_FAULT
    progress.result({"training": str(made), "metrics": str(made / METRICS)})
    return 0


def _sentence(error: Exception) -> str:
    """What went wrong; an OSError names its file first."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
