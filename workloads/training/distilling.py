"""Teaching the student: it learns the ranker's log odds, and a little of what really happened.

The squared difference of log odds asks for the ranker's order among all candidates, and not only for that of the few
that a label speaks of. Rows are those that the ranker read, the whole validation lists among them, because the order
of whole lists is what the student is for.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name all of torch's documentation uses

from workloads.models.ranker import Ranker
from workloads.models.student import Student
from workloads.training.lists import RankRows

Floats = npt.NDArray[np.float32]


class StudentTraining(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long and how fast."""

    epochs: int = 6
    batch: int = 1024
    learning_rate: float = 1e-2
    """At the first step; falls to 0 in a straight line."""
    weight_decay: float = 1e-2
    label_weight: float = 0.1
    """Say of the labels beside the ranker's log odds."""


class Lesson(msgspec.Struct, frozen=True, kw_only=True):
    """R rows as tensors: the student's inputs, and what it is to say of them."""

    sparse: Tensor
    dense: Tensor
    """Standardised."""
    taught: Tensor
    """The ranker's log odds, [R, 1]."""
    label: Tensor
    offset: Tensor
    """What place and sampling add to the log odds that the label was drawn with, [R, 1]."""

    def __len__(self) -> int:
        return len(self.label)


@torch.no_grad()
def lesson(teacher: Ranker, rows: RankRows, scaled: Floats, batch: int = 16_384) -> Lesson:
    """What the teacher says of rows whose standardised dense features are `scaled`."""
    teacher.eval()
    sparse, dense = torch.from_numpy(rows.sparse), torch.from_numpy(scaled)
    parts = [teacher.logits(sparse[at : at + batch], dense[at : at + batch]) for at in range(0, len(rows), batch)]
    sampling = -torch.log(torch.from_numpy(rows.chance)).unsqueeze(1)
    return Lesson(
        sparse=sparse,
        dense=dense,
        taught=torch.cat(parts),
        label=torch.from_numpy(rows.label.astype(np.float32)).unsqueeze(1),
        offset=teacher.place_bias(torch.from_numpy(rows.place)) + sampling,
    )


def begin(model: Student, taught: Lesson) -> None:
    """Let an untaught student say the mean of what it is to learn: wanted candidates are rare, and zero is far off."""
    torch.nn.init.constant_(model.head.bias, float(taught.taught.mean()) if len(taught) else 0.0)


def teach_epoch(
    model: Student,
    optimiser: torch.optim.Optimizer,
    taught: Lesson,
    config: StudentTraining,
    *,
    epoch: int,
    seed: int,
    heard: Callable[[float, float], None],
) -> float:
    """One pass over the rows; returns the mean squared difference from the ranker's log odds."""
    order = torch.from_numpy(np.random.default_rng([seed, 2, epoch]).permutation(len(taught)))
    steps = max(1, -(-len(order) // config.batch))
    model.train()
    differences = []
    for number, at in enumerate(range(0, len(order), config.batch)):
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate * (1 - (epoch * steps + number) / (config.epochs * steps))
        picked = order[at : at + config.batch]
        logits = model.logits(taught.sparse[picked], taught.dense[picked])
        difference = F.mse_loss(logits, taught.taught[picked])
        truth = F.binary_cross_entropy_with_logits(logits + taught.offset[picked], taught.label[picked])
        loss = difference + config.label_weight * truth
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch publishes no type for it
        optimiser.step()
        differences.append(float(difference.detach()))
        heard(min(1.0, (at + config.batch) / len(order)), differences[-1])
    model.eval()
    return float(np.mean(differences)) if differences else float("nan")
