"""Two-tower retrieval: users, items and queries as vectors whose dot product says how well they go together.

Trained with in-batch sampled softmax corrected for how often an item is drawn (logQ: Yi et al.,
RecSys 2019), queries jointly against the same item vectors. The user tower reads history and context
and has no table of users. Ids are dropped at random in training, so that an item nobody has touched
yet is placed by its content.

`load(directory)` gives what a training run wrote: `weights/two_tower.safetensors` and its config.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    id_dropout: float = 0.3
    dropout: float = 0.1


class TokenMean(nn.Module):
    """Mean embedding of the hashed tokens of a text; zero for a text without any."""

    def __init__(self, buckets: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(buckets, width, padding_idx=PAD)
        nn.init.normal_(self.table.weight, std=0.1)
        with torch.no_grad():
            self.table.weight[PAD].zero_()

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T] to [B, W]. Gather and sum instead of EmbeddingBag, which ONNX has not; PAD's row is zero."""
        count = (tokens != PAD).sum(dim=1, keepdim=True).to(self.table.weight.dtype)  # [B, 1]
        mean: Tensor = self.table(tokens).sum(dim=1) / count.clamp(min=1.0)
        return mean


class ItemTower(nn.Module):
    """An item's vector: its id's embedding plus what its content says."""

    def __init__(self, config: TwoTowerConfig, tokens: TokenMean) -> None:
        super().__init__()
        self.ids = nn.Embedding(config.items + 1, VECTOR_DIM, padding_idx=PAD)
        nn.init.normal_(self.ids.weight, std=0.02)
        with torch.no_grad():
            self.ids.weight[PAD].zero_()
        self.tokens = tokens
        self.categories = nn.Embedding(config.categories + 1, config.category_width)
        width = config.category_width + config.token_width + NUMERIC + IMAGE_DIM
        self.content = nn.Sequential(nn.Linear(width, config.hidden), nn.GELU(), nn.Linear(config.hidden, VECTOR_DIM))
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
    """A user's vector: attention pooling over the vectors of the items in the history, then a residual layer.

    In training the items' vectors come fresh from the item tower (`pool`); for serving they are kept
    in `table` (`TwoTower.bake`), so that the tower reads item indices and nothing else.
    """

    table: Tensor

    def __init__(self, config: TwoTowerConfig) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(config.items + 1, VECTOR_DIM))
        self.touch = nn.Linear(2, VECTOR_DIM)
        self.attention = nn.Sequential(
            nn.Linear(VECTOR_DIM, VECTOR_DIM), nn.Tanh(), nn.Linear(VECTOR_DIM, config.heads)
        )
        self.fading = nn.Linear(2, config.heads)
        self.mix = nn.Linear(config.heads * VECTOR_DIM, VECTOR_DIM, bias=False)
        self.deep = nn.Sequential(
            nn.Linear(VECTOR_DIM + len(CONTEXT), config.hidden),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, VECTOR_DIM),
        )
        self.anybody = nn.Parameter(torch.zeros(VECTOR_DIM))
        with torch.no_grad():
            # Begins as the mean of the heads: a sensible recommender before the first step.
            self.mix.weight.copy_(torch.eye(VECTOR_DIM).repeat(1, config.heads) / config.heads)

    def forward(self, history: Tensor, history_strength: Tensor, history_age_hours: Tensor, context: Tensor) -> Tensor:
        """History, strength and age [B, H], context [B, 4] to vectors [B, D]; an empty history is anybody's."""
        return self.pool(self.table[history], history != PAD, history_strength, history_age_hours, context)

    def pool(self, items: Tensor, known: Tensor, strength: Tensor, age_hours: Tensor, context: Tensor) -> Tensor:
        """The same from item vectors [B, H, D] and whether there is an item at all [B, H]."""
        somebody = known.any(dim=1, keepdim=True).to(items.dtype)  # [B, 1]
        touch = torch.stack((strength - 1.0, torch.log1p(age_hours) / 4.0 - 1.0), dim=-1)  # [B, H, 2]
        scores = self.attention(items + self.touch(touch)) + self.fading(touch)  # [B, H, heads]
        scores = scores.masked_fill(~known.unsqueeze(-1), -1e4)
        weights = torch.softmax(scores, dim=1) * somebody.unsqueeze(-1)  # [B, H, heads]
        pooled = weights.transpose(1, 2) @ items  # [B, heads, D]
        taste = self.mix(pooled.flatten(1))  # [B, D]
        vector: Tensor = taste + self.anybody + self.deep(torch.cat((taste, context), dim=-1))
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
        tokens = TokenMean(config.token_buckets, config.token_width)
        self.user = UserTower(config)
        self.item = ItemTower(config, tokens)
        self.query = QueryTower(config, tokens)

    @torch.no_grad()
    def bake(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Give the user tower the vectors of all items, [N + 1, D] with PAD zero, and return them.

        `inputs` are the item tower's for rows 0 to N. Call it after the last step of training.
        """
        training = self.training
        self.eval()
        vectors: Tensor = self.item(**inputs)
        vectors[PAD] = 0.0
        self.user.table.copy_(vectors)
        self.train(training)
        return vectors


def sampled_softmax(queries: Tensor, items: Tensor, *, wanted: Tensor, targets: Tensor, log_q: Tensor) -> Tensor:
    """Mean sampled softmax loss of each query's item against a batch of items, corrected by logQ.

    `queries` [B, D]; `items` [M, D] are the candidates with ids `targets` [M] and log drawing
    probabilities `log_q` [M]; row b's own item is candidate b (M >= B) with id `wanted` [B].
    Other candidates that are the row's own item are left out.
    """
    logits = queries @ items.T - log_q  # [B, M]
    own = torch.arange(len(queries))
    same = wanted.unsqueeze(1) == targets.unsqueeze(0)  # [B, M]
    same[own, own] = False
    return F.cross_entropy(logits.masked_fill(same, -1e4), own)


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
    stored = load_file(directory / WEIGHTS_FILE)
    missing = model.state_dict().keys() - stored.keys() - _shared(model)
    try:
        _, unexpected = model.load_state_dict(stored, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{directory / WEIGHTS_FILE}: {error}; train again") from None
    if missing or unexpected:
        raise ValueError(
            f"{directory / WEIGHTS_FILE}: missing {sorted(missing)}, unexpected {sorted(unexpected)}; train again"
        )
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
