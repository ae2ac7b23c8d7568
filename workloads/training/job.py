"""From a prepared data set to trained models, item tables and their measured quality.

Temporal stacking: the log up to the end of training is followed by slices as long as validation. At
the start of each slice the towers and tables of what had happened by then are made (the towers go on
from the slice before), and the slice's requests get the candidate lists that would have been served
from them. The ranker learns from the lists of the training slices, is stopped early by the validation
slice, and then reads the validation lists once; the student learns from the ranker on the same rows. What is
served, and measured on the test part, are towers and tables of everything before the test part, that ranker and
that student. The half-life of taste, the weights of fusion and the boost of the kNN row are chosen on the first slice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save_file
from torch import Tensor

from workloads.contract.http import SOURCES
from workloads.contract.quality import QualityReport
from workloads.contract.slo import Rung
from workloads.contract.tensors import ITEM_TABLES, PAD, FeatureSchema
from workloads.data.dataset import Dataset
from workloads.data.features import ItemTables, UserState
from workloads.data.fusion import WEIGHTS
from workloads.models import ladder, metrics, ranker, student, two_tower
from workloads.models.item_knn import ItemKnnConfig
from workloads.models.ladder import LADDER_FILE, RankedLists
from workloads.models.ranker import Ranker, RankerConfig
from workloads.models.student import Student, StudentConfig
from workloads.models.text import token_table
from workloads.models.two_tower import TwoTower, TwoTowerConfig
from workloads.telemetry.progress import Progress
from workloads.training import distilling, evaluation, ranking, towers
from workloads.training.checkpoints import CHECKPOINTS, Checkpoints, draft_of, settle, write_whole
from workloads.training.distilling import StudentTraining
from workloads.training.evaluation import Asked
from workloads.training.journal import Ints, read
from workloads.training.lists import NOTHING, Items, RankRows, Shop, nearest, shown_rows, wanted_rows
from workloads.training.ranking import RankerTraining
from workloads.training.requests import People, Requests, requests_of, tower_inputs
from workloads.training.snapshots import item_tower_inputs, tables_at
from workloads.training.towers import TowerData, TowerTraining, as_tensors, user_vectors

VERSION: Final = 2
"""Of the method: a change here makes another run of the same data set and settings."""
WEIGHTS_DIR: Final = "weights"
FEATURES: Final = "features.json"
TABLES: Final = "item_tables.safetensors"
METRICS: Final = "metrics.json"
CURVES: Final = "curves.json"
FACTS: Final = "training.json"
CHECKPOINT_ROUNDS: Final = 2

_FUSION_CHOICES: Final = {"ann": (1.0, 2.0, 4.0), "history": (0.3, 1.0, 3.0), "popular": (0.1, 0.25, 0.5)}
_BOOSTS: Final = (0.0, 0.3, 1.0, 3.0)


class TrainingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that decides what comes out, besides the data."""

    seed: int = 0
    slices: int = 3
    """Training slices that the ranker learns from, each with as many events as validation."""
    half_lives_days: tuple[float, ...] = (14.0, 60.0, 365.0)
    """Tried for the neighbours; the towers look back at most twice as far."""
    towers: TowerTraining = TowerTraining()
    ranker: RankerTraining = RankerTraining()
    student: StudentTraining = StudentTraining()
    choice_requests: int = 400
    """Requests of the first slice that choices are made on."""
    test_requests: int = 2500
    """Test requests measured, at most."""
    test_queries: int = 2000
    threads: int = 2

    def small(self) -> TrainingConfig:
        """The same in a fraction of the time, for trying things out; worse models."""
        return msgspec.structs.replace(
            self,
            slices=1,
            half_lives_days=self.half_lives_days[:2],
            towers=msgspec.structs.replace(self.towers, rounds=4, refit_rounds=1, batch=256, requests=12_000),
            ranker=msgspec.structs.replace(self.ranker, epochs=2, lists=1500, shown_lists=500, validation_lists=400),
            choice_requests=100,
            test_requests=600,
            test_queries=300,
        )


class TrainingFacts(msgspec.Struct, frozen=True, kw_only=True):
    """`training.json`: what was run, on what, and how long it took. Its presence says that a run is whole."""

    digest: str
    dataset: str
    dataset_digest: str
    config: TrainingConfig
    versions: dict[str, str]
    durations_s: dict[str, float]
    boundaries_ms: dict[str, int]
    """`train_end`, `validation_end`, `end`, and the start of each training slice, `slice_0`..."""
    chosen: dict[str, float]
    """What was chosen on the first slice, and the ranker's best epoch and validation AUC."""


class DatasetTooSmallError(ValueError):
    """A data set in which a part holds nothing to learn from or to measure on."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """A span of time with the models and tables of what came before it."""

    shop: Shop
    start_ms: int
    end_ms: int
    model: Mapping[str, torch.Tensor]
    """The towers' state."""


def digest_of(dataset_digest: str, config: TrainingConfig) -> str:
    """sha256 of data set, settings and method: names a run."""
    facts = {"dataset": dataset_digest, "config": config, "version": VERSION}
    return hashlib.sha256(msgspec.json.encode(facts, order="sorted")).hexdigest()


def train(dataset_path: Path, home: Path, config: TrainingConfig, progress: Progress, *, reuse: bool = False) -> Path:
    """Train on a prepared data set and return `<home>/work/train-<digest12>`, whole.

    Goes on from where an interrupted run of the same data set and settings stopped. With `reuse` a
    finished one is returned as it is, else it is made again. Raises DatasetError, DatasetTooSmallError
    or BusyError.
    """
    begun = time.monotonic()
    progress.step("read", 0, 1)
    dataset = Dataset.load(dataset_path)
    digest = digest_of(dataset.meta.digest, config)
    final = home / "work" / f"train-{digest[:12]}"
    if reuse and (final / FACTS).is_file():
        progress.note("read", f"{final.name} is finished and is used again")
        return final
    torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(mode=True)
    with draft_of(final) as draft:
        run = _Run(dataset, config, digest, draft, progress)
        run.durations["read"] = time.monotonic() - begun
        run.work()
        settle(draft, final)
    return final


class _Run:
    """One training run, step by step; each step's result is a function of data set and settings alone."""

    def __init__(self, dataset: Dataset, config: TrainingConfig, digest: str, draft: Path, progress: Progress) -> None:
        self.config = config
        self.digest = digest
        self.draft = draft
        self.progress = progress
        self.checkpoints = Checkpoints(draft / CHECKPOINTS)
        self.durations: dict[str, float] = {}
        self.curves: dict[str, list[float]] = {
            "towers_loss": [],
            "ranker_loss": [],
            "ranker_auc": [],
            "student_loss": [],
        }
        self.chosen: dict[str, float] = {}
        self.meta = dataset.meta
        self.catalogue, self.journal = read(dataset)
        self.people = People(self.journal.positives())
        self.cuts = self._cuts()
        wanted = self.journal.wanted()
        self.anywhere = requests_of(wanted, rng=self._rng(10))
        self.at_start = requests_of(wanted)
        progress.step("read", 1, 1)

    def work(self) -> None:
        """All steps, and the files."""
        with self._step("choose"):
            knn = self._choose_knn()
        with self._step("towers"):
            slices = self._fit_towers(knn)
        with self._step("lists"):
            rows, validation = self._make_lists(slices)
        with self._step("ranker"):
            model, schema = self._fit_ranker(rows, validation, slices[-1].start_ms)
        with self._step("student"):
            pupil = self._fit_student(model, RankRows.join((rows, validation)), schema)
        with self._step("evaluate"):
            report, lists = self._evaluate(slices[-1], model, pupil, schema)
        lists.save(self.draft / LADDER_FILE)
        self._write(slices[-1], model, pupil, schema, report)

    @contextlib.contextmanager
    def _step(self, name: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self.durations[name] = round(time.monotonic() - begun, 2)

    def _cuts(self) -> list[int]:
        """Starts of the training slices, of validation and of test, and the end of the log."""
        edges = self.meta.boundaries
        first, last = np.searchsorted(self.journal.time_ms, (edges.train_end_ms, edges.validation_end_ms))
        length = max(int(last - first), 1)
        # As much is left before the first slice as a slice holds, or there are fewer slices.
        fitting = min(self.config.slices, int(first) // length - 1)
        if fitting < 1:
            raise DatasetTooSmallError(
                f"there are {int(first)} events before validation, and validation has {length}: "
                "too few to learn a ranker from lists later than its towers"
            )
        starts = [int(self.journal.time_ms[int(first) - length * number]) for number in range(fitting, 0, -1)]
        return [*starts, edges.train_end_ms, edges.validation_end_ms, edges.end_ms]

    # --- choices and towers -----------------------------------------------------------------------

    def _requests_in(self, requests: Requests, start_ms: int, end_ms: int) -> Requests:
        first, last = np.searchsorted(requests.time_ms, (start_ms, end_ms))
        return requests.take(np.arange(int(first), int(last)))

    def _asked(self, requests: Requests, model: TwoTower) -> Asked:
        states = self.people.states(requests)
        return Asked(requests, states, user_vectors(model, as_tensors(tower_inputs(states))))

    def _returning(self, start_ms: int, end_ms: int, count: int, stream: int) -> tuple[Requests, list[UserState]]:
        """At most `count` people with a history, each at the start of the first visit of a span."""
        requests = self._requests_in(self.at_start, start_ms, end_ms)
        _, first = np.unique(requests.person, return_index=True)
        order = self._rng(stream).permutation(first)
        kept: list[int] = []
        for row in order:
            state = self.people.state(int(requests.person[row]), int(requests.time_ms[row]))
            if len(state.items):
                kept.append(int(row))
            if len(kept) == count:
                break
        chosen = requests.take(np.sort(np.array(kept, dtype=np.int64)))
        return chosen, self.people.states(chosen)

    def _rng(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, *stream])

    def _choose_knn(self) -> ItemKnnConfig:
        """Half-life and boost of the kNN, by recall on the first slice."""
        requests, states = self._returning(self.cuts[0], self.cuts[1], self.config.choice_requests, 11)
        best = (-1.0, 0.0, 0.0)
        for number, half_life in enumerate(self.config.half_lives_days):
            knn = ItemKnnConfig(half_life_days=half_life)
            tables = ItemTables.of(tables_at(self.catalogue, self.journal, self.cuts[0], knn))
            shop = Shop.of(tables, {})
            for boost in _BOOSTS:
                found = [evaluation.knn_order(shop, state, exclude, boost) for state, exclude in _both_ways(states)]
                score = _mean_recall(found, requests, states)
                if score > best[0]:
                    best = (score, half_life, boost)
            self.progress.step("choose", number + 1, len(self.config.half_lives_days), "half-lives", recall=best[0])
        self.chosen |= {"half_life_days": best[1], "knn_boost": best[2]}
        return ItemKnnConfig(half_life_days=best[1])

    def _fit_towers(self, knn: ItemKnnConfig) -> list[Slice]:
        """Towers and tables at each cut; from the second cut on the towers go on from those before."""
        config = self.config.towers
        torch.manual_seed(self.config.seed)
        model = TwoTower(TwoTowerConfig(items=self.catalogue.items, categories=len(self.catalogue.categories)))
        starts = self.cuts[:-1]
        total = config.rounds + config.refit_rounds * (len(starts) - 1)
        first, last = np.searchsorted(self.anywhere.time_ms, (starts[0], starts[-1]))
        requests = self.anywhere.take(np.arange(max(0, int(first) - config.requests), int(last)))
        inputs = as_tensors(tower_inputs(self.people.states(requests)))
        slices: list[Slice] = []
        for number, cut in enumerate(starts):
            tables = tables_at(self.catalogue, self.journal, cut, knn)
            item = as_tensors(item_tower_inputs(self.catalogue, ItemTables.of(tables), cut))
            done = config.rounds + config.refit_rounds * (number - 1) if number else 0
            saved = self.checkpoints.load(f"towers-{number}")
            if saved is None:
                end = int(np.searchsorted(requests.time_ms, cut))
                known = np.arange(max(0, end - config.requests), end)
                if not len(known):
                    raise DatasetTooSmallError(
                        "nobody known did anything before the first slice: nothing to learn from"
                    )
                user = {name: values[known[0] : end] for name, values in inputs.items()}
                data = self._tower_data(requests.take(known), user, item, cut)
                self._fit_slice(model, data, number, done, total)
                self.checkpoints.save(
                    f"towers-{number}", {"model": model.state_dict(), "curve": self.curves["towers_loss"]}
                )
            else:
                model.load_state_dict(saved["model"])
                self.curves["towers_loss"] = [float(loss) for loss in saved["curve"]]
                self.progress.step("towers", done + (config.refit_rounds if number else config.rounds), total, "rounds")
            tables["vectors"] = model.bake(item).numpy().copy()
            weights: Mapping[str, float] = slices[0].shop.weights if slices else {}
            shop = Shop.of(ItemTables.of(tables), weights)
            if not slices:
                shop = Shop(shop.tables, shop.popular, self._choose_fusion(shop, model))
            state = {name: values.clone() for name, values in model.state_dict().items()}
            slices.append(Slice(shop, cut, self.cuts[number + 1], state))
        return slices

    def _tower_data(
        self, requests: Requests, user: Mapping[str, Tensor], item: Mapping[str, Tensor], cut_ms: int
    ) -> TowerData:
        """What the towers read at a cut. Where nobody ever searched, titles stand for queries."""
        found = self.journal.before(cut_ms).clicks()
        found = found.take(np.flatnonzero(found.query >= 0))
        if len(found):
            numbers, places = np.unique(found.query, return_inverse=True)
            tokens = token_table([found.queries[number] for number in numbers])[places]
            items = found.item
        else:
            there = np.flatnonzero((self.catalogue.first_seen_ms < cut_ms) & (self.catalogue.tokens[:, 0] != PAD))
            tokens, items = self.catalogue.tokens[there], there
        return TowerData(
            requests=requests,
            user=user,
            item=item,
            query_tokens=torch.from_numpy(tokens),
            query_items=torch.from_numpy(items),
            query_weight=self.config.towers.query_weight if len(found) else self.config.towers.title_weight,
            half_life_days=min(self.config.towers.half_life_days, 2.0 * self.chosen["half_life_days"]),
        )

    def _fit_slice(self, model: TwoTower, data: TowerData, number: int, done: int, total: int) -> None:
        """One fit, saved every few rounds."""
        config = self.config.towers
        rounds = config.refit_rounds if number else config.rounds
        rate = config.refit_learning_rate if number else config.learning_rate
        optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=config.weight_decay, fused=True)
        first = 0
        saved = self.checkpoints.load("towers")
        if saved is not None and saved["slice"] == number:
            model.load_state_dict(saved["model"])
            optimiser.load_state_dict(saved["optimiser"])
            self.curves["towers_loss"] = [float(loss) for loss in saved["curve"]]
            first = int(saved["round"])

        def heard(at: int, loss: float) -> None:
            self.curves["towers_loss"].append(loss)
            self.progress.step("towers", done + at + 1, total, "rounds", loss=loss)

        for at in range(first, rounds, CHECKPOINT_ROUNDS):
            end = min(rounds, at + CHECKPOINT_ROUNDS)
            seed = self.config.seed * 1000 + number
            towers.fit(
                model,
                optimiser,
                data,
                config,
                rounds=range(at, end),
                total=rounds,
                learning_rate=rate,
                seed=seed,
                heard=heard,
            )
            self.checkpoints.save(
                "towers",
                {
                    "slice": number,
                    "round": end,
                    "model": model.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "curve": self.curves["towers_loss"],
                },
            )

    def _choose_fusion(self, shop: Shop, model: TwoTower) -> dict[str, float]:
        """Say of each source in the fused score, one after the other, by recall on the first slice."""
        requests, states = self._returning(self.cuts[0], self.cuts[1], self.config.choice_requests, 12)
        users = user_vectors(model, as_tensors(tower_inputs(states)))
        near = list(nearest(shop.tables.vectors, users))
        weights = dict(WEIGHTS)

        def recall() -> float:
            trial = Shop(shop.tables, shop.popular, weights)
            found = [
                trial.candidates(state, users[place // 2], near[place // 2], exclude, evaluation.SHOWN).items
                for place, (state, exclude) in enumerate(_both_ways(states))
            ]
            return _mean_recall(found, requests, states)

        best = recall()
        for source, choices in _FUSION_CHOICES.items():
            before = weights[source]
            for choice in choices:
                kept, weights[source] = weights[source], choice
                score = recall()
                if score > best + 1e-9:
                    best = score
                else:
                    weights[source] = kept
            if weights[source] != before:
                self.progress.note("towers", f"{source} weighs {weights[source]:g} in the fused score", recall=best)
        self.chosen |= {f"fusion_{source}": weights[source] for source in _FUSION_CHOICES}
        return weights

    # --- ranker -----------------------------------------------------------------------------------

    def _make_lists(self, slices: list[Slice]) -> tuple[RankRows, RankRows]:
        """The ranker's training rows and the rows of whole validation lists."""
        config = self.config.ranker
        model = TwoTower(TwoTowerConfig(items=self.catalogue.items, categories=len(self.catalogue.categories)))
        training = slices[:-2]
        parts: list[RankRows] = []
        steps = len(training) + 1
        for number, part in enumerate(slices[:-1]):
            model.load_state_dict(part.model)
            held_out = number == len(training)
            count = config.validation_lists if held_out else config.lists // len(training)
            rng = self._rng(20, number)
            requests = self._requests_in(self.anywhere, part.start_ms, part.end_ms).sample(count, rng)
            asked = self._asked(requests, model)
            negatives = None if held_out else config.negatives

            def heard(done: int, number: int = number, of: int = len(asked)) -> None:
                self.progress.step("lists", number + done / max(of, 1), steps, "slices")

            parts.append(
                wanted_rows(
                    part.shop, asked.requests, asked.states, asked.users, rng=rng, negatives=negatives, heard=heard
                )
            )
            if not held_out:
                span = self.journal.between(part.start_ms, part.end_ms)
                parts.insert(
                    0,
                    shown_rows(
                        part.shop,
                        span.impressions(),
                        span.clicks(),
                        self.people,
                        lambda states: user_vectors(model, as_tensors(tower_inputs(states))),
                        lists=config.shown_lists // len(training),
                        rng=rng,
                    ),
                )
        validation = parts.pop()
        rows = RankRows.join(parts)
        for name, found in (("training", rows), ("validation", validation)):
            if not 0 < int(found.label.sum()) < len(found):
                raise DatasetTooSmallError(
                    f"the {name} lists hold no wanted candidate: the ranker has nothing to learn"
                )
        self.progress.note(
            "lists",
            f"{len(rows)} rows to learn from, {len(validation)} to validate on",
            wanted=float(rows.label.sum()),
            shown=float((rows.place > 0).sum()),
        )
        return rows, validation

    def _fit_ranker(self, rows: RankRows, validation: RankRows, reference_ms: int) -> tuple[Ranker, FeatureSchema]:
        """The ranker of the best validation AUC, after it has read the validation lists once; and its features."""
        config = self.config.ranker
        catalogue = self.catalogue
        mean, scale = ranking.standardisation(rows)
        schema = FeatureSchema(
            items=catalogue.items,
            categories=catalogue.categories,
            price_edges=catalogue.price_edges,
            dense_mean=[float(value) for value in mean],
            dense_scale=[float(value) for value in scale],
            fusion={source: self.chosen.get(f"fusion_{source}", weight) for source, weight in WEIGHTS.items()},
            reference_ms=reference_ms,
        )
        torch.manual_seed(self.config.seed)
        model = Ranker(
            RankerConfig(
                items=catalogue.items,
                categories=len(catalogue.categories),
                price_bands=len(catalogue.price_edges) + 1,
                sources=len(SOURCES),
            )
        )
        optimiser = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        scaled, scaled_validation = (rows.dense - mean) / scale, (validation.dense - mean) / scale
        best: dict[str, Any] = {"auc": -1.0, "epoch": -1, "model": None}
        first = 0
        saved = self.checkpoints.load("ranker")
        if saved is not None:
            model.load_state_dict(saved["model"])
            optimiser.load_state_dict(saved["optimiser"])
            best, first = saved["best"], int(saved["epoch"])
            self.curves |= {name: list(saved[name]) for name in ("ranker_loss", "ranker_auc")}
        for epoch in range(first, config.epochs):
            if epoch - best["epoch"] > config.patience:
                break

            def heard(share: float, loss: float, epoch: int = epoch) -> None:
                self.progress.step("ranker", epoch + share, config.epochs + 1, "passes", loss=loss)

            seed = self.config.seed
            loss = ranking.fit_epoch(model, optimiser, rows, scaled, config, epoch=epoch, seed=seed, heard=heard)
            auc = ranking.validation_auc(model, validation, scaled_validation)
            self.curves["ranker_loss"].append(loss)
            self.curves["ranker_auc"].append(auc)
            self.progress.note("ranker", f"pass {epoch + 1}", loss=loss, validation_auc=auc)
            if auc > best["auc"]:
                state = {name: values.clone() for name, values in model.state_dict().items()}
                best = {"auc": auc, "epoch": epoch, "model": state}
            self.checkpoints.save(
                "ranker",
                {
                    "epoch": epoch + 1,
                    "model": model.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "best": best,
                    "ranker_loss": self.curves["ranker_loss"],
                    "ranker_auc": self.curves["ranker_auc"],
                },
            )
        model.load_state_dict(best["model"])
        self.chosen |= {"ranker_epoch": float(best["epoch"] + 1), "validation_auc": float(best["auc"])}
        optimiser = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        last = config.epochs

        def heard_last(share: float, loss: float) -> None:
            self.progress.step("ranker", last + share, last + 1, "passes", loss=loss)

        ranking.fit_epoch(
            model, optimiser, validation, scaled_validation, config, epoch=last, seed=self.config.seed, heard=heard_last
        )
        return model, schema

    def _fit_student(self, teacher: Ranker, rows: RankRows, schema: FeatureSchema) -> Student:
        """A student of the finished ranker, taught on all rows that the ranker read."""
        config = self.config.student
        mean, scale = _standard(schema)
        taught = distilling.lesson(teacher, rows, (rows.dense - mean) / scale)
        torch.manual_seed(self.config.seed)
        model = Student(
            StudentConfig(
                items=schema.items,
                categories=len(schema.categories),
                price_bands=len(schema.price_edges) + 1,
                sources=len(SOURCES),
            )
        )
        distilling.begin(model, taught)
        optimiser = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        first = 0
        saved = self.checkpoints.load("student")
        if saved is not None:
            model.load_state_dict(saved["model"])
            optimiser.load_state_dict(saved["optimiser"])
            self.curves["student_loss"] = list(saved["student_loss"])
            first = int(saved["epoch"])
        for epoch in range(first, config.epochs):

            def heard(share: float, difference: float, epoch: int = epoch) -> None:
                self.progress.step("student", epoch + share, config.epochs, "passes", difference=difference)

            difference = distilling.teach_epoch(
                model, optimiser, taught, config, epoch=epoch, seed=self.config.seed, heard=heard
            )
            self.curves["student_loss"].append(difference)
            self.checkpoints.save(
                "student",
                {
                    "epoch": epoch + 1,
                    "model": model.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "student_loss": self.curves["student_loss"],
                },
            )
        return model.eval()

    # --- quality and files ------------------------------------------------------------------------

    def _evaluate(
        self, last: Slice, model: Ranker, pupil: Student, schema: FeatureSchema
    ) -> tuple[QualityReport, RankedLists]:
        """The table on the test part, and the lists behind the ladder in it; its student has not been quantised."""
        towers_model = TwoTower(TwoTowerConfig(items=self.catalogue.items, categories=len(self.catalogue.categories)))
        towers_model.load_state_dict(last.model)
        requests, states = self._returning(last.start_ms, last.end_ms, self.config.test_requests, 13)
        if not len(requests):
            raise DatasetTooSmallError("nobody with a history comes back in the test part: nothing can be measured")
        asked = Asked(requests, states, user_vectors(towers_model, as_tensors(tower_inputs(states))))
        mean, scale = _standard(schema)

        def score(sparse: Ints, dense: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
            return ranking.probabilities(model, sparse, (dense - mean) / scale)

        rows, quality, lists = evaluation.table(
            last.shop,
            asked,
            score,
            knn_boost=self.chosen["knn_boost"],
            heard=lambda done: self.progress.step("evaluate", done, len(asked), "requests"),
        )
        found = self.journal.between(last.start_ms, last.end_ms).clicks()
        found = found.take(np.flatnonzero(found.query >= 0))
        if len(found):
            drawn = np.sort(self._rng(14).permutation(len(found))[: self.config.test_queries])
            found = found.take(drawn)
            tokens = torch.from_numpy(token_table([found.queries[number] for number in found.query]))
            with torch.no_grad():
                queries = towers_model.eval().query(tokens).numpy()
            rows += evaluation.search_rows(last.shop, queries, found.item)
        sparse, scaled = lists.sparse.astype(np.int64), (lists.dense - mean) / scale
        models: dict[int, Ranker | Student] = {Rung.FULL_RANKER: model, Rung.DISTILLED_RANKER: pupil}
        scores = {rung: ranking.probabilities(one, sparse, scaled) for rung, one in models.items()}
        report = QualityReport(
            dataset=self.meta.name,
            rows=rows,
            ranker=quality,
            statements=evaluation.statements(rows),
            rungs=ladder.measure(lists, scores),
        )
        return report, lists

    def _write(self, last: Slice, model: Ranker, pupil: Student, schema: FeatureSchema, report: QualityReport) -> None:
        weights = self.draft / WEIGHTS_DIR
        weights.mkdir(exist_ok=True)
        towers_model = TwoTower(TwoTowerConfig(items=self.catalogue.items, categories=len(self.catalogue.categories)))
        towers_model.load_state_dict(last.model)
        two_tower.save(towers_model, weights)
        ranker.save(model, weights)
        student.save(pupil, weights)
        tables = {name: np.ascontiguousarray(getattr(last.shop.tables, name)) for name in ITEM_TABLES}
        tables["in_stock"] = self.catalogue.in_stock
        save_file(tables, self.draft / TABLES)
        facts = TrainingFacts(
            digest=self.digest,
            dataset=self.meta.name,
            dataset_digest=self.meta.digest,
            config=self.config,
            versions={"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__},
            durations_s=self.durations,
            boundaries_ms={
                **{f"slice_{number}": cut for number, cut in enumerate(self.cuts[:-3])},
                "train_end": self.cuts[-3],
                "validation_end": self.cuts[-2],
                "end": self.cuts[-1],
            },
            chosen=self.chosen,
        )
        for name, content in ((FEATURES, schema), (METRICS, report), (CURVES, self.curves), (FACTS, facts)):
            write_whole(self.draft / name, msgspec.json.format(msgspec.json.encode(content), indent=1))


def _standard(schema: FeatureSchema) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Mean and scale [F_d] of the dense features."""
    return np.array(schema.dense_mean, dtype=np.float32), np.array(schema.dense_scale, dtype=np.float32)


def _both_ways(states: Sequence[UserState]) -> Iterator[tuple[UserState, Items]]:
    """Each state twice: asked without what was bought, and with it."""
    for state in states:
        yield state, state.bought_items
        yield state, NOTHING


def _mean_recall(found: Sequence[Items], requests: Requests, states: Sequence[UserState]) -> float:
    """Mean recall of lists made in the order of `_both_ways`; a request with nothing new counts one way."""
    values = []
    for place, (_, exclude) in enumerate(_both_ways(states)):
        wanted = requests.wanted(place // 2)
        wanted = wanted[~np.isin(wanted, exclude)]
        if len(wanted):
            values.append(metrics.recall_at(found[place], wanted, evaluation.SHOWN))
    return float(np.mean(values)) if values else 0.0
