"""`MODEL_CARD.md` of a bundle: what it was made from, how good it is, what it is for and what it is not.

After Mitchell et al., "Model Cards for Model Reporting" (FAT* 2019). Every figure is a measured one.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from workloads.bundle.manifest import Facts
from workloads.contract.quality import Protocol, QualityRow, RungQuality
from workloads.contract.slo import STUDENT_LOSS_MAX, Rung
from workloads.contract.tensors import FeatureSchema
from workloads.data.dataset import DatasetMeta

_PROTOCOLS: dict[Protocol, str] = {
    "novel": "Items the person has not bought before",
    "repeats": "All items, bought before or not",
    "search": "The item behind a query",
}
_RUNGS: dict[int, str] = {
    Rung.FULL_RANKER: "full ranker",
    Rung.DISTILLED_RANKER: "distilled ranker, INT8",
    Rung.RETRIEVAL_SCORE: "retrieval score",
    Rung.TRADITIONAL: "item-to-item and popularity",
}


def model_card(facts: Facts, dataset: DatasetMeta, schema: FeatureSchema) -> str:
    """The card's text, Markdown."""
    quality, ranker = facts.quality, facts.quality.ranker
    parts = [
        f"# Recommender trained on `{facts.dataset}`",
        f"Made {_day(facts.created_ms)} from training run `{facts.training_digest}`.",
        "## Intended use",
        "Ranking of a shop's own catalogue for its own visitors: recommendations, search results, similar items. "
        "The towers and the ranker read pseudonymous behaviour, catalogue facts and the time of day; there is no "
        "table of people in any of them.",
        "## Data",
        _table(
            ("fact", "value"),
            [
                ("data set", f"`{dataset.name}`, digest `{facts.dataset_digest[:12]}`, from {dataset.source}"),
                ("people, items", f"{dataset.users:,}, {dataset.items:,}"),
                ("events", ", ".join(f"{count:,} {kind}" for kind, count in dataset.events.items() if count)),
                ("training until", _day(dataset.train_end_ms)),
                ("validation until", _day(dataset.validation_end_ms)),
                ("test until", _day(dataset.end_ms)),
                ("tables and ages as of", _day(schema.reference_ms)),
                ("pseudonym key epoch", str(facts.key_epoch)),
            ],
        ),
        "Parts are split by time; nothing from the future of a request reaches its features.",
        "## Quality on the test period",
        *(f"- {statement}" for statement in quality.statements),
        *_quality_tables(quality.rows),
        *_ladder(quality.rungs),
        "### Click and purchase probability",
        _table(
            ("measure", "value"),
            [
                ("AUC", f"{ranker.auc:.4f}"),
                ("log-loss", f"{ranker.log_loss:.4f}"),
                ("calibration (predicted / observed)", f"{ranker.calibration:.3f}"),
                ("base rate", f"{ranker.base_rate:.4f}"),
                ("rows", f"{ranker.rows:,}"),
            ],
        ),
        "## Export",
        _table(
            ("model", "largest difference", "limit", "top-k agreement", "real inputs"),
            [
                (
                    role,
                    f"{p.max_abs_error:.2g}",
                    f"{p.limit:.2g}",
                    f"{p.top_k_agreement:.2%} of {p.k}",
                    f"{p.samples:,}",
                )
                for role, p in facts.parity.items()
            ],
        ),
        f"Vector index: {facts.ann.kind}, {facts.ann.items:,} items, recall@10 {facts.ann.recall_at_10:.4f} against "
        f"exact search on {facts.ann.queries:,} real vectors.",
        "## Limits",
        "- Learned from what was shown and clicked: what was never shown could not be liked. Place bias is modelled, "
        "not removed.",
        "- An item without events is placed by its text, category, price and image alone.",
        "- Probabilities are calibrated for the candidates of this data set; elsewhere only their order has meaning.",
        "- Not for decisions about people (credit, prices per person, employment).",
    ]
    return "\n\n".join(_joined(parts)) + "\n"


def _joined(parts: Sequence[str]) -> list[str]:
    """Neighbouring list items stay one list."""
    result: list[str] = []
    for part in parts:
        if part.startswith("- ") and result and result[-1].startswith("- "):
            result[-1] += f"\n{part}"
        else:
            result.append(part)
    return result


def _quality_tables(rows: Sequence[QualityRow]) -> list[str]:
    parts = []
    for protocol, title in _PROTOCOLS.items():
        found = [row for row in rows if row.protocol == protocol]
        if not found:
            continue
        names = list(dict.fromkeys(name for row in found for name in row.metrics))
        lines = [
            (
                row.name,
                "" if row.rung is None else str(row.rung),
                *(f"{row.metrics[name]:.4f}" if name in row.metrics else "" for name in names),
                f"{row.requests:,}",
            )
            for row in found
        ]
        parts += [f"### {title}", _table(("recommender", "rung", *names, "requests"), lines)]
    return parts


def _ladder(rungs: Sequence[RungQuality]) -> list[str]:
    """What a step down costs, a table per protocol."""
    if not rungs:
        return []
    parts = [
        "### The quality ladder",
        "Each rung on the same requests and candidate lists as rung 1, measured with the files of this bundle; a loss "
        f"below zero is a gain. Rung 2 may lose {STUDENT_LOSS_MAX:.0%}, and what chance explains where requests are "
        "few. A search is not ranked: it has no rung 1.",
    ]
    for protocol, title in _PROTOCOLS.items():
        lines = [
            (
                f"{row.rung} {_RUNGS[row.rung]}",
                f"{row.ndcg_at_10:.4f}",
                f"{row.loss:.1%}",
                f"{row.loss_error:.1%}",
                "" if row.auc is None else f"{row.auc:.4f}",
                f"{row.requests:,}",
            )
            for row in rungs
            if row.protocol == protocol
        ]
        if lines:
            head = ("rung", "ndcg@10", "loss", "standard error", "AUC", "requests")
            parts += [f"{title}:", _table(head, lines)]
    return parts


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _day(moment_ms: int) -> str:
    return f"{datetime.datetime.fromtimestamp(moment_ms / 1000, datetime.UTC):%Y-%m-%d %H:%M} UTC"
