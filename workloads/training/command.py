"""Training's own options, and the run with its faults told; where it happens is `workloads.training.__main__`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

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


def run(argv: Sequence[str], dataset: Path, progress: Progress, *, parent: argparse.ArgumentParser) -> int:
    """Train on `dataset` as the options say; `parent` has those that were read before. 0, or 2 for a fault."""
    arguments = _arguments(argv, parent)
    try:
        made = train(dataset, arguments.home, _config(arguments), progress, reuse=arguments.reuse)
    except tuple(_REMEDIES) as error:
        progress.fault(_sentence(error), next(text for kind, text in _REMEDIES.items() if isinstance(error, kind)))
        return EXIT_FAULT
    progress.result({"training": str(made), "metrics": str(made / METRICS), "dataset": str(dataset)})
    return 0


def _arguments(argv: Sequence[str], parent: argparse.ArgumentParser) -> argparse.Namespace:
    defaults = TrainingConfig()
    parser = argparse.ArgumentParser(
        prog="python -m workloads.training",
        description="Train on a prepared data set, or on its replica in a bucket.",
        parents=[parent],
        allow_abbrev=False,
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, help="what all chance comes from")
    parser.add_argument("--rounds", type=int, help=f"rounds of the towers' first fit ({defaults.towers.rounds})")
    parser.add_argument("--epochs", type=int, help=f"passes of the ranker, at most ({defaults.ranker.epochs})")
    parser.add_argument("--student-epochs", type=int, help=f"passes of the student ({defaults.student.epochs})")
    parser.add_argument("--slices", type=int, help=f"spans of time the ranker learns from ({defaults.slices})")
    parser.add_argument("--threads", type=int, help=f"threads of torch ({defaults.threads})")
    parser.add_argument("--small", action="store_true", help="a fraction of the work, for trying things out")
    parser.add_argument("--reuse", action="store_true", help="take a finished run of the same data and settings")
    return parser.parse_args(argv)


def _config(arguments: argparse.Namespace) -> TrainingConfig:
    for name in ("rounds", "epochs", "student_epochs", "slices", "threads"):
        value = getattr(arguments, name)
        if value is not None and not 1 <= value <= 1000:
            raise _SettingError(f"--{name.replace('_', '-')} {value}: must be 1 to 1000")
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
    if arguments.student_epochs is not None:
        config = replace(config, student=replace(config.student, epochs=arguments.student_epochs))
    if arguments.slices is not None:
        config = replace(config, slices=arguments.slices)
    if arguments.threads is not None:
        config = replace(config, threads=arguments.threads)
    return config


def _sentence(error: Exception) -> str:
    """What went wrong; an OSError names its file first."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)
