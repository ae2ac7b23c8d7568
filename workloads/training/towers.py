"""Fitting the three towers to what happened before a cut.

One step takes requests with some of their wanted items, and queries with the item behind each; all
item vectors of a step are computed once and shared by both losses. Negatives are the other rows'
items and some drawn evenly from the catalogue (mixed negative sampling: Yang et al., WWW 2020), so
that items nobody touches are pushed away too; logQ counts both ways of being drawn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name all of torch's documentation uses

from workloads.contract.tensors import PAD
from workloads.data.features import DAY_MS
from workloads.models.two_tower import TwoTower, sampled_softmax
from workloads.training.requests import Requests

ROUND_STEPS = 32


class TowerTraining(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long and how fast."""

    rounds: int = 8
    """Rounds of ROUND_STEPS steps for the first fit."""
    refit_rounds: int = 3
    """Rounds when the towers move on to a later cut."""
    batch: int = 512
    per_request: int = 2
    """Wanted items drawn of one request at a time, at most."""
    uniform: int = 512
    """Items drawn evenly from the catalogue as further negatives in each step."""
    learning_rate: float = 6e-3
    refit_learning_rate: float = 2e-3
    weight_decay: float = 0.1
    query_batch: int = 256
    query_weight: float = 1.0
    """Say of the queries' loss against the users'."""
    title_weight: float = 0.1
    """The same where nobody searched and titles stand for queries."""
    requests: int = 60_000
    """The latest so many requests before a cut are read."""
    half_life_days: float = 60.0
    """A request this much older than the latest is drawn half as often; less where neighbours fade faster."""


@dataclasses.dataclass(frozen=True)
class TowerData:
    """What one fit reads, as tensors."""

    requests: Requests
    user: Mapping[str, Tensor]
    """The user tower's inputs, a row per request."""
    item: Mapping[str, Tensor]
    """The item tower's inputs, rows 0 to N."""
    query_tokens: Tensor
    """[Q, T], a row per (query, item)."""
    query_items: Tensor
    """[Q]"""
    query_weight: float
    """Say of the queries' loss against the users'."""
    half_life_days: float
    """A request this much older than the latest is drawn half as often."""

    @property
    def query_shares(self) -> Tensor:
        """How often each item stands behind a query, [N + 1]."""
        counts = torch.bincount(self.query_items, minlength=len(self.item["item"])).to(torch.float32)
        return counts / counts.sum().clamp(min=1.0)


def fit(
    model: TwoTower,
    optimiser: torch.optim.Optimizer,
    data: TowerData,
    config: TowerTraining,
    *,
    rounds: range,
    total: int,
    learning_rate: float,
    seed: int,
    heard: Callable[[int, float], None],
) -> None:
    """Run the `rounds` out of `total`; each draws from its own seed, so that a resumed fit goes on alike.

    `heard(round, loss)` is called after each. `learning_rate` falls as a cosine over `total`.
    """
    age = (data.requests.time_ms.max(initial=0) - data.requests.time_ms) / DAY_MS
    chance = np.exp2(-age / data.half_life_days)
    chance /= chance.sum()
    # How often each item is drawn as somebody's wanted one: what logQ corrects for.
    length = np.diff(data.requests.offsets)
    weight = np.repeat(chance * np.minimum(length, config.per_request) / np.maximum(length, 1), length)
    drawn = np.bincount(data.requests.items, weights=weight, minlength=model.config.items + 1)
    shares = torch.from_numpy(drawn / max(drawn.sum(), 1e-12)).to(torch.float32)
    touched = (data.user["history"] != PAD).sum(dim=1).numpy()
    model.train()
    for number in rounds:
        rng = np.random.default_rng([seed, number])
        torch.manual_seed(int(rng.integers(2**62)))
        rows = rng.choice(len(chance), ROUND_STEPS * config.batch, p=chance)
        losses = []
        for step, batch in enumerate(_batches(rows, touched, config.batch, rng)):
            done = (number + step / ROUND_STEPS) / total
            for group in optimiser.param_groups:
                group["lr"] = learning_rate * max(0.02, 0.5 * (1.0 + np.cos(np.pi * done)))
            loss = _step_loss(model, data, config, rows=batch, shares=shares, rng=rng)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]  # torch publishes no type for it
            optimiser.step()
            losses.append(float(loss.detach()))
        heard(number, float(np.mean(losses)))
    model.eval()


def _step_loss(
    model: TwoTower,
    data: TowerData,
    config: TowerTraining,
    *,
    rows: npt.NDArray[np.int64],
    shares: Tensor,
    rng: np.random.Generator,
) -> Tensor:
    owner, wanted = _draw(data.requests, rows, config.per_request, rng)
    negatives = torch.from_numpy(rng.integers(1, model.config.items + 1, config.uniform))
    asked = torch.from_numpy(rng.integers(0, max(len(data.query_items), 1), config.query_batch))
    query_items = data.query_items[asked] if len(data.query_items) else data.query_items
    picked = torch.from_numpy(rows)
    history = data.user["history"][picked]  # [B, H]
    longest = int((history != PAD).sum(dim=1).max())  # columns before are PAD in every row
    user = {name: values[picked] for name, values in data.user.items()}
    user |= {name: values[:, -max(longest, 1) :] for name, values in user.items() if name != "context"}
    history = user["history"]

    # Every item of this step once through the item tower, then to its places.
    every, places = torch.unique(torch.cat((history.flatten(), wanted, negatives, query_items)), return_inverse=True)
    vectors = model.item(**{name: values[every] for name, values in data.item.items()})  # [U, D]
    sizes = (history.numel(), len(wanted), len(negatives), len(query_items))
    in_history, in_wanted, in_negatives, in_queries = places.split(sizes)

    users = model.user.pool(
        F.embedding(in_history.view(history.shape), vectors),  # [B, H, D]
        history != PAD,
        user["history_strength"],
        user["history_age_hours"],
        user["context"],
    )  # [B, D]
    loss = _against(
        users[owner],
        vectors,
        in_wanted=in_wanted,
        in_negatives=in_negatives,
        wanted=wanted,
        negatives=negatives,
        shares=shares,
    )
    if len(query_items):
        queries = model.query(data.query_tokens[asked])  # [Q, D]
        query_loss = _against(
            queries,
            vectors,
            in_wanted=in_queries,
            in_negatives=in_negatives,
            wanted=query_items,
            negatives=negatives,
            shares=data.query_shares,
        )
        loss = loss + data.query_weight * query_loss
    return loss


def _against(
    left: Tensor,
    vectors: Tensor,
    *,
    in_wanted: Tensor,
    in_negatives: Tensor,
    wanted: Tensor,
    negatives: Tensor,
    shares: Tensor,
) -> Tensor:
    targets = torch.cat((wanted, negatives))  # [M]
    candidates = F.embedding(torch.cat((in_wanted, in_negatives)), vectors)  # [M, D]
    drawn = len(wanted) * shares[targets] + len(negatives) / (len(shares) - 1)
    return sampled_softmax(left, candidates, wanted=wanted, targets=targets, log_q=torch.log(drawn.clamp(min=1e-9)))


def _draw(
    requests: Requests, rows: npt.NDArray[np.int64], most: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """For the given requests, at most `most` wanted items each: (place in `rows`, item), both [P]."""
    length = requests.offsets[rows + 1] - requests.offsets[rows]
    owner = np.repeat(np.arange(len(rows)), length)
    first = np.repeat(requests.offsets[rows], length)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(length) - length, length)
    order = np.lexsort((rng.random(len(owner)), owner))
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(length) - length, length)
    order = order[nth < most]
    items = requests.items[(first + place)[order]]
    return torch.from_numpy(owner[order]), torch.from_numpy(items)


def _batches(
    rows: npt.NDArray[np.int64], touched: npt.NDArray[np.int64], size: int, rng: np.random.Generator
) -> list[npt.NDArray[np.int64]]:
    """Batches of requests, each of about the same history length, so that little padding is computed."""
    ordered = rows[np.argsort(touched[rows], kind="stable")]
    batches = [ordered[at : at + size] for at in range(0, len(ordered), size)]
    return [batches[place] for place in rng.permutation(len(batches))]


def as_tensors(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, Tensor]:
    """Arrays as tensors that share their memory."""
    return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in arrays.items()}


@torch.no_grad()
def user_vectors(model: TwoTower, user: Mapping[str, Tensor], batch: int = 1024) -> npt.NDArray[np.float32]:
    """The user tower's answer [R, D] to each row of its inputs, as it will be served."""
    model.eval()
    rows = len(user["history"])
    parts = [
        model.user(**{name: values[at : at + batch] for name, values in user.items()}).numpy()
        for at in range(0, rows, batch)
    ]
    return np.concatenate(parts) if parts else np.empty((0, model.user.table.shape[1]), dtype=np.float32)
