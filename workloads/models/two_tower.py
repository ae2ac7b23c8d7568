"""Two-tower retrieval: users, items and queries as vectors whose dot product says how well they go together.

Trained with in-batch sampled softmax corrected for how often an item is drawn (logQ: Yi et al.,
RecSys 2019), queries jointly against the same item vectors. The user tower reads history and context
and has no table of users. Ids are dropped at random in training, so that an item nobody has touched
yet is placed by its content.

`load(directory)` gives what a training run wrote: `weights/two_tower.safetensors` and its config.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name all of torch's documentation uses

from workloads.contract.tensors import CONTEXT, IMAGE_DIM, ITEM_TOWER, PAD, TOKEN_BUCKETS, VECTOR_DIM

WEIGHTS_FILE: Final = "two_tower.safetensors"
CONFIG_FILE: Final = "two_tower.json"
NUMERIC: Final = next(spec.shape[0] for spec in ITEM_TOWER.inputs if spec.name == "numeric")


class TwoTowerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes of the towers; `items` and `categories` without index 0."""

    items: int
    categories: int
    token_buckets: int = TOKEN_BUCKETS
    token_width: int = 32
    category_width: int = 16
    hidden: int = 128
    heads: int = 4
    id_dropout: float = 0.1
    dropout: float = 0.1


class ItemEmbedding(nn.Embedding):
    """Embeddings of item ids [N + 1, VECTOR_DIM]; row PAD is zero and stays so. Both towers read it."""

    def __init__(self, items: int) -> None:
        super().__init__(items + 1, VECTOR_DIM, padding_idx=PAD)
        nn.init.normal_(self.weight, std=VECTOR_DIM**-0.5)
        with torch.no_grad():
            self.weight[PAD].zero_()


class TokenMean(nn.Module):
    """Mean embedding of the hashed tokens of a text; zero for a text without any."""

    def __init__(self, buckets: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(buckets, width, padding_idx=PAD)
        nn.init.normal_(self.table.weight, std=0.1)
        with torch.no_grad():
            self.table.weight[PAD].zero_()

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T] to [B, W]. Gather and masked mean instead of EmbeddingBag, which ONNX has not."""
        mask = (tokens != PAD).unsqueeze(-1).to(self.table.weight.dtype)  # [B, T, 1]
        total = (self.table(tokens) * mask).sum(dim=1)  # [B, W]
        mean: Tensor = total / mask.sum(dim=1).clamp(min=1.0)
        return mean


class ItemTower(nn.Module):
    """An item's vector: its id's embedding plus what its content says."""

    def __init__(self, config: TwoTowerConfig, ids: ItemEmbedding, tokens: TokenMean) -> None:
        super().__init__()
        self.ids = ids
        self.tokens = tokens
        self.categories = nn.Embedding(config.categories + 1, config.category_width)
        width = config.category_width + config.token_width + NUMERIC + IMAGE_DIM
        self.content = nn.Sequential(
            nn.Linear(width, config.hidden), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(config.hidden, VECTOR_DIM)
        )
        self.id_dropout = config.id_dropout

    def forward(self, item: Tensor, category: Tensor, tokens: Tensor, numeric: Tensor, image: Tensor) -> Tensor:
        """Item [B], category [B], tokens [B, T], numeric [B, 3], image [B, I] to vectors [B, D]."""
        parts = (self.categories(category), self.tokens(tokens), numeric, image)
        content = self.content(torch.cat(parts, dim=-1))  # [B, D]
        ids = self.ids(item)  # [B, D]
        if self.training and self.id_dropout > 0:
            ids = ids * (torch.rand(len(ids), 1) >= self.id_dropout).to(ids.dtype)
        vector: Tensor = ids + content
        return vector


class UserTower(nn.Module):
    """A user's vector from history and context: attention pooling with learned queries, then a residual layer."""

    def __init__(self, config: TwoTowerConfig, ids: ItemEmbedding) -> None:
        super().__init__()
        self.ids = ids
        self.heads = config.heads
        self.position = nn.Linear(2, VECTOR_DIM)
        self.attention = nn.Sequential(
            nn.Linear(VECTOR_DIM, VECTOR_DIM), nn.Tanh(), nn.Linear(VECTOR_DIM, config.heads)
        )
        self.bias = nn.Linear(2, config.heads)
        self.mix = nn.Linear(config.heads * VECTOR_DIM, VECTOR_DIM)
        self.deep = nn.Sequential(
            nn.Linear(VECTOR_DIM + len(CONTEXT), config.hidden),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, VECTOR_DIM),
        )
        self.nobody = nn.Parameter(torch.zeros(VECTOR_DIM))

    def forward(self, history: Tensor, history_strength: Tensor, history_age_hours: Tensor, context: Tensor) -> Tensor:
        """History, strength and age [B, H], context [B, 4] to vectors [B, D]; an empty history is nobody's."""
        mask = history != PAD  # [B, H]
        known = mask.any(dim=1, keepdim=True).to(context.dtype)  # [B, 1]
        signs = torch.stack((history_strength, torch.log1p(history_age_hours) / 8.0), dim=-1)  # [B, H, 2]
        items = self.ids(history)  # [B, H, D]
        scores = self.attention(items + self.position(signs)) + self.bias(signs)  # [B, H, heads]
        scores = scores.masked_fill(~mask.unsqueeze(-1), -1e4)
        weights = torch.softmax(scores, dim=1) * known.unsqueeze(-1)  # [B, H, heads]
        pooled = torch.einsum("bhd,bhk->bkd", items, weights)  # [B, heads, D]
        taste = self.mix(pooled.flatten(1)) + (1.0 - known) * self.nobody  # [B, D]
        vector: Tensor = taste + self.deep(torch.cat((taste, context), dim=-1))
        return vector


class QueryTower(nn.Module):
    """A query's vector, from the token table that item titles are read with."""

    def __init__(self, config: TwoTowerConfig, tokens: TokenMean) -> None:
        super().__init__()
        self.tokens = tokens
        self.deep = nn.Sequential(
            nn.Linear(config.token_width, config.hidden), nn.GELU(), nn.Linear(config.hidden, VECTOR_DIM)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T] to vectors [B, D]."""
        vector: Tensor = self.deep(self.tokens(tokens))
        return vector


class TwoTower(nn.Module):
    """The three towers with the tables they share."""

    def __init__(self, config: TwoTowerConfig) -> None:
        super().__init__()
        self.config = config
        ids = ItemEmbedding(config.items)
        tokens = TokenMean(config.token_buckets, config.token_width)
        self.user = UserTower(config, ids)
        self.item = ItemTower(config, ids, tokens)
        self.query = QueryTower(config, tokens)


def sampled_softmax(
    queries: Tensor, items: Tensor, *, wanted: Tensor, targets: Tensor, log_q: Tensor, weights: Tensor
) -> Tensor:
    """Mean sampled softmax loss of each query's item against a batch of items, corrected by logQ.

    `queries` [B, D]; `items` [M, D] are the candidates with ids `targets` [M] and log drawing
    probabilities `log_q` [M]; row b's own item is candidate b (M >= B) with id `wanted` [B].
    Candidates that are the same item as the row's own count once. `weights` [B] weigh the rows.
    """
    logits = queries @ items.T - log_q  # [B, M]
    own = torch.arange(len(queries))
    same = wanted.unsqueeze(1) == targets.unsqueeze(0)  # [B, M]
    same[own, own] = False
    losses = F.cross_entropy(logits.masked_fill(same, -1e4), own, reduction="none")
    return (losses * weights).sum() / weights.sum().clamp(min=1e-6)


def save(model: TwoTower, directory: Path) -> None:
    """Write weights and config into `directory`, which exists."""
    directory.joinpath(CONFIG_FILE).write_bytes(msgspec.json.encode(model.config))
    # Shared tables are stored once, under the first of their names.
    state = model.state_dict()
    stored = {name: tensor.contiguous() for name, tensor in state.items() if name not in _shared(model)}
    save_file(stored, directory / WEIGHTS_FILE)


def load(directory: Path) -> TwoTower:
    """The model of a run's `weights/` directory, in eval mode on CPU.

    Its modules `user`, `item` and `query` take the inputs of `contract.tensors.USER_TOWER`,
    `ITEM_TOWER` and `QUERY_TOWER` by name and order. Raises OSError or ValueError when files are
    missing or do not fit each other.
    """
    config = msgspec.json.decode(directory.joinpath(CONFIG_FILE).read_bytes(), type=TwoTowerConfig)
    model = TwoTower(config)
    missing, unexpected = model.load_state_dict(load_file(directory / WEIGHTS_FILE), strict=False)
    lost = sorted(set(missing) - _shared(model))
    if lost or unexpected:
        raise ValueError(f"{directory / WEIGHTS_FILE}: missing {lost}, unexpected {unexpected}; train again")
    return model.eval()


def _shared(model: TwoTower) -> set[str]:
    """Names under which a table appears again."""
    seen: set[int] = set()
    again = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            again.add(name)
        seen.add(id(tensor))
    return again
