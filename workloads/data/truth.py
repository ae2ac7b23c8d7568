"""What the simulator planted: the taste and popularity that its events were drawn from.

Saved in a data set's `truth/`. Tests and the quality table's oracle row open it; training never does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

LATENT_DIM: Final = 16
FILE: Final = "truth.npz"


class ChoiceWeights(msgspec.Struct, frozen=True, kw_only=True):
    """Weights of the choice model. All terms are natural-log odds."""

    popularity: float = 0.75
    """Times log Zipf weight."""
    taste: float = 1.9
    """Times the match of the user's and the item's latent vectors (standard deviation about 1)."""
    price: float = 0.5
    """Times user sensitivity times squared distance between the item's price tier and the user's level."""
    noun: float = 1.8
    """Added when the item is of the product type that this mission looks for."""
    zipf: float = 0.9
    """Exponent s of the planted popularity: weight ~ rank^-s."""
    category: float = 1.3
    """Standard deviation of a user's log preference for a category."""
    drift: float = 0.6
    """How far taste turns over the simulated period, as a share of its length."""
    keep_mission: float = 0.6
    """Probability that a visit goes on with the mission of the visit before."""
    complement: float = 0.3
    """Probability that a new mission is in the category that goes with the last one."""


@dataclass(frozen=True)
class Truth:
    """Everything planted. Row u of the user arrays is `users[u]`, row i of the item arrays is `items[i]`.

    Shapes: U users, I items, C categories, D latent dimensions, K list positions.
    """

    weights: ChoiceWeights
    start_ms: int
    end_ms: int
    users: npt.NDArray[np.str_]  # (U,) ids; pseudonyms once saved in a data set
    items: npt.NDArray[np.str_]  # (I,)
    user_vectors: Floats  # (U, D) taste at start_ms
    user_drift: Floats  # (U, D) added over the whole period
    user_category: Floats  # (U, C) log preference, normalised
    user_price_level: Floats  # (U,) preferred price tier
    user_price_sensitivity: Floats  # (U,)
    item_vectors: Floats  # (I, D)
    item_log_popularity: Floats  # (I,) log Zipf weight
    item_category: Ints  # (I,)
    item_noun: Ints  # (I,) product type within its category
    item_price_tier: Floats  # (I,) standardised log price within its product type
    item_first_seen_ms: Ints  # (I,)
    item_last_ms: Ints  # (I,) nothing happens with the item from then on
    complement: Ints  # (C,) the category that a mission likes to go on to
    examination: Floats  # (K,) probability that a position of a list is looked at

    def taste(self, users: Ints, at_ms: Ints) -> Floats:
        """Latent taste of user rows at moments, (n, D): it turns slowly, at constant length."""
        share = ((at_ms - self.start_ms) / max(1, self.end_ms - self.start_ms)).astype(np.float32)[:, None]
        turned = self.user_vectors[users] + share * self.user_drift[users]
        length = np.linalg.norm(turned, axis=1, keepdims=True)
        scaled: Floats = turned * (np.float32(np.sqrt(LATENT_DIM)) / np.maximum(length, np.float32(1e-6)))
        return scaled

    def liking(self, users: Ints, at_ms: Ints, items: Ints) -> Floats:
        """What taste and price say about `items` (m,) for each of n users, (n, m); popularity is not in it."""
        match = self.taste(users, at_ms) @ self.item_vectors[items].T / np.float32(np.sqrt(LATENT_DIM))
        distance = self.item_price_tier[items][None, :] - self.user_price_level[users][:, None]
        priced = self.user_price_sensitivity[users][:, None] * distance**2
        return (np.float32(self.weights.taste) * match - np.float32(self.weights.price) * priced).astype(np.float32)

    def choice_probability(self, users: Ints, at_ms: Ints, missions: Ints | None = None) -> Floats:
        """Probability that a user browsing at a moment goes to each item, (n, I).

        `missions` (n,) are the categories being looked for, -1 where unknown: then the user's
        preferences decide. The product type looked for is taken as unknown.
        """
        result = np.zeros((len(users), len(self.items)), dtype=np.float32)
        preference = np.exp(self.user_category[users])
        if missions is not None:
            known = missions >= 0
            preference[known] = 0.0
            preference[np.flatnonzero(known), missions[known]] = 1.0
        for category in range(self.user_category.shape[1]):
            members = np.flatnonzero(self.item_category == category)
            if not len(members):
                continue
            logits = self.liking(users, at_ms, members)
            logits += np.float32(self.weights.popularity) * self.item_log_popularity[members]
            there = (self.item_first_seen_ms[members][None, :] <= at_ms[:, None]) & (
                self.item_last_ms[members][None, :] > at_ms[:, None]
            )
            logits = np.where(there, logits, np.float32(-np.inf))
            peak = logits.max(axis=1, keepdims=True)
            odds = np.exp(logits - np.where(np.isfinite(peak), peak, 0.0))
            total = odds.sum(axis=1, keepdims=True)
            result[:, members] = preference[:, [category]] * odds / np.maximum(total, np.float32(1e-30))
        return result

    def save(self, folder: Path, users: list[str]) -> Path:
        """Write `truth.npz` into `folder` with these names for the user rows; raw ids stay out of a data set."""
        if len(users) != len(self.users):
            raise ValueError(f"{len(users)} names for {len(self.users)} users")
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in {"weights", "users"}}
        arrays["users"] = np.array(users)
        arrays["weights"] = np.frombuffer(msgspec.json.encode(self.weights), dtype=np.uint8)
        path = folder / FILE
        with path.open("wb") as file:
            np.savez(file, **arrays)
        return path

    @classmethod
    def load(cls, folder: Path) -> Truth:
        """Read what `save` wrote. No pickle is accepted."""
        with np.load(folder / FILE, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        weights = msgspec.json.decode(arrays.pop("weights").tobytes(), type=ChoiceWeights)
        for name in ("start_ms", "end_ms"):
            arrays[name] = int(arrays[name])
        return cls(weights=weights, **arrays)
