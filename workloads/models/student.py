"""The student: a small ranker taught by the ranker (Hinton et al., 2015), made to be served in INT8 on a CPU.

Rung 2 of the ladder. It reads what the ranker reads, less of it (`SPARSE`) and through a plain perceptron: no
crosses, so that every multiplication is a matrix product that 8 bits can hold, and a request costs the process
that runs it a fraction of a millisecond. Inputs are clamped to `reach`, because the scale of an 8 bit input is
set by the widest of them.

`load(directory)` gives what a training run wrote: `weights/student.safetensors` and its config. It does not know
how it is taught (`workloads.training.distilling`) nor how it becomes INT8 (`workloads.export.quantising`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec
import torch
from torch import Tensor, nn

from workloads.contract.tensors import RANKER_DENSE, RANKER_SPARSE
from workloads.models import weights

WEIGHTS_FILE: Final = "student.safetensors"
CONFIG_FILE: Final = "student.json"
SPARSE: Final = ("item", "category", "price_band", "source")
"""Of the ranker's sparse features those that the student reads; what the last item says is in the dense ones."""


class StudentConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes; `items`, `categories` and `price_bands` without index 0."""

    items: int
    categories: int
    price_bands: int
    sources: int
    item_width: int = 4
    small_width: int = 4
    hidden: tuple[int, ...] = (64, 32)
    reach: float = 4.0
    """Standardised features are clamped to +- this; the ranker's own clamp is twice as wide."""


class Student(nn.Module):
    """Embeddings beside the dense features, then a perceptron."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        rows = {
            "item": config.items + 1,
            "category": config.categories + 1,
            "price_band": config.price_bands + 1,
            "source": config.sources,
        }
        widths = {"item": config.item_width}
        self.tables = nn.ModuleDict(
            {name: nn.Embedding(rows[name], widths.get(name, config.small_width)) for name in SPARSE}
        )
        for table in self.tables.values():
            nn.init.normal_(table.weight, std=0.02)  # type: ignore[arg-type]  # a module's attribute has no known type
        width = sum(table.embedding_dim for table in self.tables.values()) + len(RANKER_DENSE)  # type: ignore[misc]
        layers: list[nn.Module] = []
        for hidden in config.hidden:
            layers += [nn.Linear(width, hidden), nn.ReLU()]
            width = hidden
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, 1)

    def logits(self, sparse: Tensor, dense: Tensor) -> Tensor:
        """Sparse [B, F_s] and dense [B, F_d] to log odds [B, 1]."""
        reach = self.config.reach
        parts = [table(sparse[:, RANKER_SPARSE.index(name)]) for name, table in self.tables.items()]  # [B, W_f] each
        # Clamped together: the embeddings are inputs of the same 8 bit product.
        answer: Tensor = self.head(self.body(torch.cat((*parts, dense), dim=1).clamp(-reach, reach)))
        return answer

    def forward(self, sparse: Tensor, dense: Tensor) -> Tensor:
        """Sparse int64 [B, F_s] and dense float32 [B, F_d] to probabilities [B, 1]."""
        return torch.sigmoid(self.logits(sparse, dense))


def save(model: Student, directory: Path) -> None:
    """Write weights and config into `directory`, which exists."""
    weights.save(model, model.config, directory / CONFIG_FILE, directory / WEIGHTS_FILE)


def load(directory: Path) -> Student:
    """The model of a run's `weights/` directory, in eval mode on CPU.

    `forward(sparse, dense)` is as `contract.tensors.STUDENT` says. Raises OSError or ValueError when
    files are missing or do not fit each other.
    """
    return weights.load(Student, StudentConfig, directory / CONFIG_FILE, directory / WEIGHTS_FILE)
