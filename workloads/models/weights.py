"""A model on disk: its sizes as JSON and its weights as safetensors, side by side. It knows no architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec
from safetensors.torch import load_file, save_file
from torch import nn

_Config = TypeVar("_Config", bound=msgspec.Struct)
_Model = TypeVar("_Model", bound=nn.Module)


def save(model: nn.Module, config: msgspec.Struct, config_file: Path, weights_file: Path) -> None:
    """Write both files into a directory that exists."""
    config_file.write_bytes(msgspec.json.encode(config))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, weights_file)


def load(
    make: Callable[[_Config], _Model], config_type: type[_Config], config_file: Path, weights_file: Path
) -> _Model:
    """What `save` wrote, in eval mode on CPU. Raises OSError or ValueError for files missing, or of two models."""
    model = make(msgspec.json.decode(config_file.read_bytes(), type=config_type))
    try:
        model.load_state_dict(load_file(weights_file))
    except RuntimeError as error:
        raise ValueError(f"{weights_file}: {error}; train again") from None
    return model.eval()
