"""Fitting the ranker: BCE with AdamW, stopped early by the AUC of validation lists.

Negatives are a sample; the log odds are corrected by the chance a row was kept with, so that
probabilities are those of whole lists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F  # noqa: N812 - the name all of torch's documentation uses

from workloads.models import metrics
from workloads.models.ranker import Ranker
from workloads.models.student import Student
from workloads.training.lists import RankRows

Floats = npt.NDArray[np.float32]


class RankerTraining(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long and how fast."""

    epochs: int = 5
    """At most; early stopping usually ends it before."""
    patience: int = 1
    """Passes without a better validation AUC that are put up with."""
    batch: int = 2048
    learning_rate: float = 1e-3
    weight_decay: float = 5e-2
    negatives: int = 30
    """Unwanted candidates kept of each training list."""
    lists: int = 8_000
    """Requests that lists are made for, at most."""
    shown_lists: int = 6_000
    """Lists really shown that are read besides, at most."""
    validation_lists: int = 1_500


def standardisation(rows: RankRows) -> tuple[Floats, Floats]:
    """Mean and scale [F_d] of the dense features; a feature that never changes has scale 1."""
    weight = np.where(rows.label > 0, 1.0, 1.0 / rows.chance)
    mean = np.average(rows.dense, axis=0, weights=weight)
    scale = np.sqrt(np.average((rows.dense - mean) ** 2, axis=0, weights=weight))
    return mean.astype(np.float32), np.where(scale < 1e-6, 1.0, scale).astype(np.float32)


def fit_epoch(
    model: Ranker,
    optimiser: torch.optim.Optimizer,
    rows: RankRows,
    scaled: Floats,
    config: RankerTraining,
    *,
    epoch: int,
    seed: int,
    heard: Callable[[float, float], None],
) -> float:
    """One pass over the rows, `scaled` being their standardised dense features; returns the mean loss."""
    rng = np.random.default_rng([seed, 1, epoch])
    torch.manual_seed(int(rng.integers(2**62)))
    order = torch.from_numpy(rng.permutation(len(rows)))
    sparse, dense = torch.from_numpy(rows.sparse), torch.from_numpy(scaled)
    label = torch.from_numpy(rows.label.astype(np.float32)).unsqueeze(1)
    place = torch.from_numpy(rows.place)
    # Kept with chance c, a negative stands for 1 / c of them: the odds of the sample are 1 / c too high.
    offset = -torch.log(torch.from_numpy(rows.chance)).unsqueeze(1)
    model.train()
    losses = []
    for at in range(0, len(order), config.batch):
        picked = order[at : at + config.batch]
        logits = model.logits(sparse[picked], dense[picked]) + model.place_bias(place[picked]) + offset[picked]
        loss = F.binary_cross_entropy_with_logits(logits, label[picked])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch publishes no type for it
        optimiser.step()
        losses.append(float(loss.detach()))
        heard(min(1.0, (at + config.batch) / len(order)), losses[-1])
    model.eval()
    return float(np.mean(losses)) if losses else float("nan")


@torch.no_grad()
def probabilities(
    model: Ranker | Student, sparse: npt.NDArray[np.int64], scaled: Floats, batch: int = 16_384
) -> npt.NDArray[np.float32]:
    """The model's answer [n] to rows with standardised dense features, as it will be served."""
    model.eval()
    parts: list[npt.NDArray[Any]] = [
        model(torch.from_numpy(sparse[at : at + batch]), torch.from_numpy(scaled[at : at + batch])).numpy()[:, 0]
        for at in range(0, len(sparse), batch)
    ]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.float32)


def validation_auc(model: Ranker, rows: RankRows, scaled: Floats) -> float:
    """AUC of the rows of whole validation lists."""
    return metrics.auc(rows.label, probabilities(model, rows.sparse, scaled))
