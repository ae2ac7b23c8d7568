"""What the simulator says it planted can be measured in its log."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest

from workloads.contract.events import EventType, is_uuid7
from workloads.contract.tensors import IMAGE_DIM
from workloads.data.cleaning import check_items
from workloads.data.events import POSITIVE
from workloads.data.simulator import DAY_MS, HOURS, LIST_LENGTH, WEEKDAYS, Simulation, SimulatorConfig, simulate
from workloads.data.truth import LATENT_DIM, Truth
from workloads.data.vocabulary import BRANDS, CATEGORIES, COLOURS, STYLES

SMALL = SimulatorConfig(users=100, items=90, events=3_000, seed=3)


def rank_correlation(left: npt.NDArray[np.float64], right: npt.NDArray[np.float64]) -> float:
    return float(np.corrcoef(left.argsort().argsort(), right.argsort().argsort())[0, 1])


@pytest.fixture(scope="module")
def indexed(simulation: Simulation) -> pl.DataFrame:
    """The log with `i` and `u`, rows of the truth's item and user arrays."""
    items = pl.DataFrame({"item": simulation.truth.items, "i": np.arange(len(simulation.truth.items))})
    users = pl.DataFrame({"user": simulation.truth.users, "u": np.arange(len(simulation.truth.users))})
    frame = simulation.log.frame.join(items, on="item", how="left", maintain_order="left")
    return frame.join(users, on="user", how="left", maintain_order="left")


def test_the_same_seed_gives_the_same_log_and_another_seed_another():
    first, again = simulate(SMALL), simulate(SMALL)
    assert first.log.frame.equals(again.log.frame)
    assert first.items.equals(again.items)
    other = simulate(SimulatorConfig(users=100, items=90, events=3_000, seed=4))
    assert not first.log.frame.equals(other.log.frame)


@pytest.mark.parametrize(
    "config",
    [
        SimulatorConfig(users=20, items=60, events=500, days=14, seed=0),
        SimulatorConfig(users=5_000, items=60, events=500, seed=1),
        SimulatorConfig(users=20, items=2_000, events=5_000, seed=2),
    ],
)
def test_extreme_sizes_give_a_valid_log(config: SimulatorConfig):
    made = simulate(config)
    assert config.events - 60 <= len(made.log) <= config.events
    check_items(made.items)


@pytest.mark.parametrize("field", ["users", "items", "events", "seed", "days", "start_ms"])
def test_a_size_out_of_range_is_refused_by_name(field: str):
    with pytest.raises(ValueError, match=field):
        SimulatorConfig(**{field: -1})


def test_the_number_of_events_is_met_within_a_page(simulation: Simulation):
    assert 150_000 - 60 <= len(simulation.log) <= 150_000
    assert all(count > 0 for count in simulation.log.counts().values())


def test_ids_are_uuid7_of_the_events_own_moment(simulation: Simulation):
    for text, at in simulation.log.frame.select("event_id", "timestamp_ms").sample(200, seed=1).iter_rows():
        assert is_uuid7(text)
        assert int(text.replace("-", "")[:12], 16) == at


def test_the_catalogue_reads_like_products_and_has_what_the_contract_wants(simulation: Simulation):
    items = check_items(simulation.items)
    assert items["image"].list.len().unique().to_list() == [IMAGE_DIM]
    assert items["price"].min() > 0
    assert set(items["category"]) == {words.name for words in CATEGORIES}
    named = {words.name: words for words in CATEGORIES}
    for title, description, category in items.select("title", "description", "category").iter_rows():
        assert any(noun in title.lower() for noun in named[category].nouns)
        assert any(colour in title.lower() for colour in COLOURS)
        assert description[0].isupper()
        assert description.endswith(".")
        assert "{" not in description


def test_position_bias_can_be_recovered_from_the_log(simulation: Simulation, indexed: pl.DataFrame):
    """Items are shown at all positions, in an order blind to the user: the PBM's likelihood gives the curve back."""
    shown = indexed.filter(pl.col("type").is_in(["impression", "click"]), pl.col("query").is_null())
    counts = np.zeros((2, len(simulation.truth.items), LIST_LENGTH))
    kind = (shown["type"] == "click").cast(pl.Int8).to_numpy()
    np.add.at(counts, (kind, shown["i"].to_numpy(), shown["position"].to_numpy()), 1.0)
    impressions, clicks = counts
    examination = np.ones(LIST_LENGTH)
    for _ in range(50):  # alternate maximum of the Poisson likelihood of item effect x position effect
        attraction = clicks.sum(axis=1) / np.maximum(impressions @ examination, 1e-9)
        examination = clicks.sum(axis=0) / np.maximum(attraction @ impressions, 1e-9)
    recovered = examination / examination[0]
    planted = simulation.truth.examination / simulation.truth.examination[0]
    assert np.abs(np.log(recovered / planted)).max() < 0.25
    assert rank_correlation(recovered, planted) > 0.9


def test_a_click_rate_that_ignores_position_would_be_wrong(simulation: Simulation):
    frame = simulation.log.frame
    rate = [
        frame.filter(pl.col("type") == "click", pl.col("position") == place).height
        / frame.filter(pl.col("type") == "impression", pl.col("position") == place).height
        for place in (0, LIST_LENGTH - 1)
    ]
    assert rate[0] > 3 * rate[1]


def test_popularity_follows_the_planted_zipf_law(simulation: Simulation, indexed: pl.DataFrame):
    truth = simulation.truth
    ranked = np.sort(truth.item_log_popularity)[::-1]
    slope = np.polyfit(np.log(np.arange(1, len(ranked) + 1)), ranked, 1)[0]
    assert slope == pytest.approx(-truth.weights.zipf, abs=1e-4)

    drawn = indexed.filter(pl.col("type") == "view")["i"].to_numpy()
    count = np.bincount(drawn, minlength=len(truth.items)).astype(float)
    there = (truth.item_first_seen_ms <= truth.start_ms) & (truth.item_last_ms >= truth.end_ms)
    assert rank_correlation(count[there], truth.item_log_popularity[there].astype(float)) > 0.6
    ordered = np.sort(count)[::-1]
    head = np.arange(3, len(ordered) // 2)
    measured = np.polyfit(np.log(head + 1), np.log(ordered[head]), 1)[0]
    assert -1.2 < measured < -0.35


def test_days_and_weeks_have_their_rhythm(simulation: Simulation):
    moments = simulation.log.frame.filter(pl.col("type") == "impression", pl.col("position") == 0).select(
        pl.from_epoch("timestamp_ms", time_unit="ms").alias("at")
    )
    hours = np.bincount(moments["at"].dt.hour().to_numpy(), minlength=24)
    days = np.bincount(moments["at"].dt.weekday().to_numpy() - 1, minlength=7)
    assert np.corrcoef(hours, HOURS)[0, 1] > 0.97
    assert np.corrcoef(days, WEEKDAYS)[0, 1] > 0.8


def test_weekend_categories_are_visited_on_weekends(indexed: pl.DataFrame, simulation: Simulation):
    weekend = pl.from_epoch("timestamp_ms", time_unit="ms").dt.weekday() > 5
    views = indexed.filter(pl.col("type") == "view").join(simulation.items.select("item", "category"), on="item")
    share = dict(views.group_by("category").agg(weekend.mean().alias("share")).iter_rows())
    assert share["garden"] > share["office"] + 0.1


def test_new_items_arrive_and_nothing_happens_with_an_item_outside_its_life(
    simulation: Simulation, indexed: pl.DataFrame
):
    truth = simulation.truth
    events = indexed.filter(pl.col("i").is_not_null())
    items, at = events["i"].to_numpy(), events["timestamp_ms"].to_numpy()
    assert (truth.item_first_seen_ms[items] <= at).all()
    alive = events.filter(pl.col("type") != "rating")  # people also rate what is no longer sold
    assert (truth.item_last_ms[alive["i"].to_numpy()] > alive["timestamp_ms"].to_numpy()).all()
    arriving = (truth.item_first_seen_ms > truth.start_ms).mean()
    assert 0.1 < arriving < 0.3
    late = set(simulation.items.filter(pl.col("first_seen_ms") > truth.start_ms)["item"])
    assert len(late & set(events["item"])) > 0.5 * len(late)
    assert 0 < (~simulation.items["in_stock"]).sum() < 0.05 * len(truth.items)


def test_a_shown_list_is_one_session_with_every_position_once(simulation: Simulation):
    lists = (
        simulation.log.frame.filter(pl.col("type") == "impression")
        .group_by("session")
        .agg(
            pl.col("position").sort(),
            pl.col("item").n_unique().alias("items"),
            pl.col("user").n_unique().alias("users"),
            pl.col("timestamp_ms").n_unique().alias("moments"),
            pl.col("query").n_unique().alias("queries"),
        )
    )
    assert lists["position"].map_elements(lambda p: p.to_list() == list(range(len(p))), return_dtype=pl.Boolean).all()
    assert (lists["items"] == lists["position"].list.len()).all()
    assert lists.select(pl.col("users", "moments", "queries").max()).row(0) == (1, 1, 1)
    assert (lists["position"].list.len() == LIST_LENGTH).mean() > 0.95


def test_every_click_is_on_something_shown_and_comes_after_it(simulation: Simulation):
    frame = simulation.log.frame
    keys = ["session", "item", "position"]
    shown = frame.filter(pl.col("type") == "impression").select(*keys, pl.col("timestamp_ms").alias("shown_ms"), "user")
    clicks = frame.filter(pl.col("type") == "click")
    joined = clicks.join(shown, on=keys, how="left", suffix="_shown")
    assert joined["shown_ms"].null_count() == 0
    assert (joined["timestamp_ms"] > joined["shown_ms"]).all()
    assert joined["user"].equals(joined["user_shown"], null_equal=True)


def test_a_search_and_its_list_carry_the_query_and_nothing_else_does(simulation: Simulation):
    frame = simulation.log.frame
    searches = frame.filter(pl.col("type") == "search")
    assert searches["item"].null_count() == searches.height
    asked = dict(searches.select("session", "query").iter_rows())
    of_lists = frame.filter(pl.col("type").is_in(["impression", "click"]), pl.col("query").is_not_null())
    assert all(asked[session] == query for session, query in of_lists.select("session", "query").iter_rows())
    rest = frame.filter(~pl.col("type").is_in(["impression", "click", "search"]))
    assert rest["query"].null_count() == rest.height


def test_queries_are_words_of_products_and_some_are_mistyped(simulation: Simulation):
    words: set[str] = set()
    for text in (*COLOURS, *STYLES, *BRANDS, *(w for c in CATEGORIES for w in (*c.nouns, *c.materials))):
        words |= set(text.lower().split())
    queries = simulation.log.frame.filter(pl.col("type") == "search")["query"].to_list()
    clean = np.mean([set(query.split()) <= words for query in queries])
    assert 0.88 < clean < 0.97


def test_search_shows_what_was_asked_for(simulation: Simulation):
    shown = (
        simulation.log.frame.filter(pl.col("type") == "impression", pl.col("query").is_not_null())
        .join(simulation.items.select("item", "title"), on="item")
        .with_columns(pl.col("query").str.split(" ").list.last().alias("asked"))
        .with_columns(pl.col("title").str.to_lowercase().str.contains(pl.col("asked"), literal=True).alias("has"))
    )
    clicked = simulation.log.frame.filter(pl.col("type") == "click").select("session", "item", pl.lit(1).alias("hit"))
    rate = shown.join(clicked, on=["session", "item"], how="left").group_by("has").agg(pl.col("hit").count() / pl.len())
    by_match = dict(rate.iter_rows())
    assert by_match[True] > 2 * by_match[False]


def test_carts_come_of_views_and_purchases_of_carts(simulation: Simulation):
    frame = simulation.log.frame
    first = frame.group_by("session", "item", "type").agg(pl.col("timestamp_ms").min())

    def of(kind: EventType) -> pl.DataFrame:
        return first.filter(pl.col("type") == kind.value, pl.col("session").is_not_null()).drop("type")

    for later, earlier in ((EventType.CART, EventType.VIEW), (EventType.PURCHASE, EventType.CART)):
        joined = of(later).join(of(earlier), on=["session", "item"], how="left", suffix="_before")
        assert joined["timestamp_ms_before"].null_count() == 0
        assert (joined["timestamp_ms"] > joined["timestamp_ms_before"]).all()
    paid = frame.filter(pl.col("type") == "purchase")
    assert paid["price"].null_count() == paid["quantity"].null_count() == 0


def test_ratings_are_of_things_bought_and_rise_with_liking(simulation: Simulation, indexed: pl.DataFrame):
    ratings = indexed.filter(pl.col("type") == "rating", pl.col("u").is_not_null())
    bought = set(indexed.filter(pl.col("type") == "purchase").select("user", "item").iter_rows())
    assert set(ratings.select("user", "item").iter_rows()) <= bought
    assert set(ratings["rating"]) <= {1.0, 2.0, 3.0, 4.0, 5.0}
    truth, rows = simulation.truth, ratings.select("u", "timestamp_ms", "i").iter_rows()
    liking = [truth.liking(np.array([u]), np.array([at]), np.array([i]))[0, 0] for u, at, i in rows]
    assert np.corrcoef(liking, ratings["rating"].to_numpy())[0, 1] > 0.25


def test_consumables_are_bought_again(simulation: Simulation):
    paid = simulation.log.frame.filter(pl.col("type") == "purchase", pl.col("user").is_not_null())
    per_item = paid.group_by("user", "item").len().join(simulation.items.select("item", "category"), on="item")
    restocked = [words.name for words in CATEGORIES if words.restocked]
    again = per_item.group_by(pl.col("category").is_in(restocked)).agg((pl.col("len") > 1).mean())
    share = dict(again.iter_rows())
    assert share[True] > 0.3
    assert share[False] < 0.1


def test_some_visits_are_nobodys(simulation: Simulation):
    share = simulation.log.frame["user"].null_count() / len(simulation.log)
    assert 0.02 < share < 0.1


def test_images_show_the_latent_vectors_through_noise(simulation: Simulation):
    images = np.array(simulation.items["image"].to_list())
    design = np.column_stack([images, np.ones(len(images))])
    target = simulation.truth.item_vectors
    weights = np.linalg.lstsq(design, target, rcond=None)[0]
    unexplained = ((target - design @ weights) ** 2).sum() / ((target - target.mean(axis=0)) ** 2).sum()
    assert 0.5 < 1 - unexplained < 0.99


def test_taste_turns_slowly_at_constant_length(simulation: Simulation):
    truth = simulation.truth
    users = np.arange(200)
    start = truth.taste(users, np.full(200, truth.start_ms))
    week = truth.taste(users, np.full(200, truth.start_ms + 7 * DAY_MS))
    end = truth.taste(users, np.full(200, truth.end_ms))
    assert np.allclose(np.linalg.norm(end, axis=1), np.sqrt(LATENT_DIM), rtol=1e-4)
    cosine = (start * week).sum(axis=1).mean() / LATENT_DIM, (start * end).sum(axis=1).mean() / LATENT_DIM
    assert 0.97 < cosine[0] < 1.0
    assert 0.6 < cosine[1] < 0.95


def test_choice_probabilities_are_probabilities_over_what_is_on_sale(simulation: Simulation):
    truth = simulation.truth
    at = np.full(5, truth.start_ms + 20 * DAY_MS)
    chances = truth.choice_probability(np.arange(5), at)
    assert chances.sum(axis=1) == pytest.approx(np.ones(5), abs=1e-3)
    assert (chances[:, truth.item_first_seen_ms > at[0]] == 0).all()
    in_mission = truth.choice_probability(np.arange(5), at, np.full(5, 3))
    assert in_mission[:, truth.item_category == 3].sum(axis=1) == pytest.approx(np.ones(5), abs=1e-3)


def test_truth_survives_the_disk_under_other_names(tmp_path: Path, simulation: Simulation):
    names = [f"p1-{number:032x}" for number in range(len(simulation.truth.users))]
    simulation.truth.save(tmp_path, names)
    loaded = Truth.load(tmp_path)
    assert loaded.users.tolist() == names
    assert loaded.weights == simulation.truth.weights
    assert loaded.end_ms == simulation.truth.end_ms
    assert np.array_equal(loaded.item_vectors, simulation.truth.item_vectors)
    assert b"user-0" not in (tmp_path / "truth.npz").read_bytes()


def test_taste_can_be_learnt_oracle_beats_knn_beats_popularity(simulation: Simulation, indexed: pl.DataFrame):
    """Recall@20 of the next session's unseen items: the room a personalised model has to show itself in."""
    truth = simulation.truth
    cut = truth.end_ms - 10 * DAY_MS
    liked = indexed.filter(pl.col("type").is_in(POSITIVE), pl.col("u").is_not_null(), pl.col("session").is_not_null())
    train = liked.filter(pl.col("timestamp_ms") < cut)
    seen = np.zeros((len(truth.users), len(truth.items)), dtype=np.float32)
    seen[train["u"].to_numpy(), train["i"].to_numpy()] = 1.0
    count = seen.sum(axis=0)
    together = seen.T @ seen
    np.fill_diagonal(together, 0.0)
    similar = together / np.sqrt(np.maximum(np.outer(count, count), 1.0))
    last = dict(train.group_by("u", maintain_order=True).agg(pl.col("i").last()).iter_rows())
    test = (
        liked.filter(pl.col("timestamp_ms") >= cut, pl.col("u").is_in(list(last)))
        .group_by("u", "session", maintain_order=True)
        .agg(pl.col("i").unique(), pl.col("timestamp_ms").min())
        .unique("u", keep="first", maintain_order=True)
    )
    users, at = test["u"].to_numpy(), test["timestamp_ms"].to_numpy()
    mission = truth.item_category[[last[user] for user in users.tolist()]]
    free, bound = truth.choice_probability(users, at), truth.choice_probability(users, at, mission)
    scores = {
        "popularity": np.tile(count, (len(users), 1)),
        "item_knn": seen[users] @ similar,
        "oracle": truth.weights.keep_mission * bound + (1 - truth.weights.keep_mission) * free,
    }
    recall = {}
    for name, score in scores.items():
        best = np.argsort(-np.where(seen[users] > 0, -np.inf, score), axis=1)[:, :20]
        shares = [
            len(set(top) & wanted) / len(wanted)
            for user, top, items in zip(users.tolist(), best.tolist(), test["i"].to_list(), strict=True)
            if (wanted := {item for item in items if not seen[user, item]})
        ]
        recall[name] = np.mean(shares)
    assert len(users) > 300
    assert recall["item_knn"] > 1.3 * recall["popularity"]
    assert recall["oracle"] > 1.5 * recall["item_knn"]
    assert recall["oracle"] > 3.0 * recall["popularity"]
