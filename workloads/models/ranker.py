"""The CTR ranker: a deep and cross network, version 2, with dropout (Wang et al., WWW 2021).

Reads the features of `workloads.data.features.rank_features` and answers the probability that a
candidate is wanted. In training a bias per place in the list shown stands beside the logit and takes
what is owed to the place (Zhao et al., RecSys 2019); serving knows no place and has no bias.

`load(directory)` gives what a training run wrote: `weights/ranker.safetensors` and its config.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec
import torch
from torch import Tensor, nn

from workloads.contract.tensors import RANKER_DENSE, RANKER_SPARSE
from workloads.models import weights

WEIGHTS_FILE: Final = "ranker.safetensors"
CONFIG_FILE: Final = "ranker.json"
PLACES: Final = 51
"""Places of a shown list that have a bias of their own; later ones share the last."""


class RankerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes; `items`, `categories` and `price_bands` without index 0."""

    items: int
    categories: int
    price_bands: int
    sources: int
    item_width: int = 8
    category_width: int = 8
    small_width: int = 4
    cross_layers: int = 2
    hidden: tuple[int, ...] = (128, 64)
    dropout: float = 0.1
    item_dropout: float = 0.5
    """Share of rows that are ranked without knowing which item it is: what is hot moves on, features stay."""


class CrossLayer(nn.Module):
    """x0 * (W x + b) + x: one more degree of interaction between all features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, first: Tensor, x: Tensor) -> Tensor:
        """Both [B, W] to [B, W]."""
        crossed: Tensor = first * self.linear(x) + x
        return crossed


class Ranker(nn.Module):
    """Cross layers, then a deep part on top of them and the raw features beside it."""

    def __init__(self, config: RankerConfig) -> None:
        super().__init__()
        self.config = config
        # Candidate and last item share a table, as do their categories.
        rows = {"item": config.items, "category": config.categories}
        rows |= {"price_band": config.price_bands, "source": config.sources - 1}
        widths = {"item": config.item_width, "category": config.category_width}
        self.tables = nn.ModuleDict(
            {
                name: nn.Embedding(count + 1, widths.get(name, config.small_width), padding_idx=None)
                for name, count in rows.items()
            }
        )
        for table in self.tables.values():
            nn.init.normal_(table.weight, std=0.02)  # type: ignore[arg-type]  # a module's attribute has no known type
        self._table_of = {name: name.removeprefix("last_") for name in RANKER_SPARSE}
        width = sum(self.tables[self._table_of[name]].embedding_dim for name in RANKER_SPARSE) + len(RANKER_DENSE)  # type: ignore[misc]
        self.crosses = nn.ModuleList([CrossLayer(width) for _ in range(config.cross_layers)])
        layers: list[nn.Module] = []
        before = width
        for hidden in config.hidden:
            layers += [nn.Linear(before, hidden), nn.ReLU(), nn.Dropout(config.dropout)]
            before = hidden
        self.deep = nn.Sequential(*layers)
        self.head = nn.Linear(before + width, 1)
        self.places = nn.Embedding(PLACES + 1, 1, padding_idx=0)
        nn.init.zeros_(self.places.weight)

    def logits(self, sparse: Tensor, dense: Tensor) -> Tensor:
        """Sparse [B, F_s] and dense [B, F_d] to log odds [B, 1]."""
        parts = []
        for column, name in enumerate(RANKER_SPARSE):
            values = self.tables[self._table_of[name]](sparse[:, column])  # [B, W_f]
            if self.training and self.config.item_dropout > 0 and name in {"item", "last_item"}:
                kept = torch.rand(len(values), 1) >= self.config.item_dropout
                values = values * kept.to(values.dtype)
            parts.append(values)
        first = torch.cat((*parts, dense.clamp(-8.0, 8.0)), dim=1)  # [B, W]
        x = first
        for cross in self.crosses:
            x = cross(first, x)
        deep = self.deep(x)  # [B, hidden]
        answer: Tensor = self.head(torch.cat((x, deep), dim=1))
        return answer

    def place_bias(self, places: Tensor) -> Tensor:
        """What the place shown adds to the log odds, [B, 1]; `places` [B] are 0 for no place, else 1 + place."""
        bias: Tensor = self.places(places.clamp(max=PLACES))
        return bias

    def forward(self, sparse: Tensor, dense: Tensor) -> Tensor:
        """Sparse int64 [B, F_s] and dense float32 [B, F_d] to probabilities [B, 1]."""
        return torch.sigmoid(self.logits(sparse, dense))


def save(model: Ranker, directory: Path) -> None:
    """Write weights and config into `directory`, which exists."""
    weights.save(model, model.config, directory / CONFIG_FILE, directory / WEIGHTS_FILE)


def load(directory: Path) -> Ranker:
    """The model of a run's `weights/` directory, in eval mode on CPU.

    `forward(sparse, dense)` is as `contract.tensors.RANKER` says. Raises OSError or ValueError when
    files are missing or do not fit each other.
    """
    return weights.load(Ranker, RankerConfig, directory / CONFIG_FILE, directory / WEIGHTS_FILE)
