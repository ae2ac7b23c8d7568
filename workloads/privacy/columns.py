"""The column policy: what of each column may leave home, as a file, and the function that makes it so.

The default is `columns.toml` beside this module. Whatever it does not name does not leave: a new column is refused
until somebody has decided about it. `Policy.apply` is pure and works on one Arrow table at a time; what takes the
whole of a data set to know (which queries enough people typed) is gathered before by `Policy.context`. It knows
nothing of files to send, of manifests or of where the tables come from.

Rules of `generalise`:

- `time` (`to_ms`): integer milliseconds, rounded down to a multiple of `to_ms`; order is kept.
- `step` (`step`): numbers, rounded to the nearest multiple of `step`.
- `cap` (`at`): numbers above `at` become `at`.
- `uuid7` (`to_ms`): RFC 9562 version 7 ids hold a clock; it is rounded down, the rest is a keyed hash of the old id.
- `text` (`min_users`, `of`, `drop_row_where`): e-mail addresses, telephone numbers, links and words with five digits or
  more in a row become blanks; a text that fewer than `min_users` different values of column `of` stand beside becomes
  null (k-anonymity; rows without a person count for nobody); rows with such a null that match `drop_row_where` go.
"""

from __future__ import annotations

import hmac
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from workloads.contract.http import PSEUDONYM_PATTERN, SESSION_PATTERN
from workloads.privacy.pseudonym import PseudonymKey

DEFAULT: Final = Path(__file__).with_name("columns.toml")

_PSEUDONYM: Final = re.compile(PSEUDONYM_PATTERN)
_SESSION: Final = re.compile(SESSION_PATTERN)
_UUID7: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
_EVENT: Final = b"rankbridge/event\x00"

_PRIVATE: Final = re.compile(
    r"""
    \S+@\S+                            # an e-mail address, and whatever else is spelt with an at sign
    | \b(?:https?://|www\.)\S+         # a link: often with a token in it
    | \+?\(?\d[\d\s()./_-]{5,}\d       # a telephone, card or account number, with its usual separators
    | \S*\d{5,}\S*                     # a word with a long run of digits: an order, a customer, a postcode
    """,
    re.VERBOSE,
)


class PolicyError(Exception):
    """A policy that cannot be used, or a table that it does not let out; names fault and remedy."""

    def __init__(self, fault: str, remedy: str) -> None:
        super().__init__(f"{fault}; {remedy}")
        self.fault = fault
        self.remedy = remedy


class Leave(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """It leaves as it is."""

    def of_column(self, given: pa.ChunkedArray, _: Context, __: frozenset[str], /) -> pa.ChunkedArray:
        """The column as it leaves: what each action has."""
        return given


class Never(Leave, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """It does not leave."""


class Pseudonymise(Leave, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"kind": "as"}):
    """Pseudonyms of `kind` pass; a raw id is mapped, and becomes null where home knows no such person."""

    kind: Literal["user", "session"]

    def of_column(self, given: pa.ChunkedArray, context: Context, _: frozenset[str], /) -> pa.ChunkedArray:
        """See `Leave`."""
        if self.kind == "user":
            return _mapped(given, lambda value: value if _PSEUDONYM.fullmatch(value) else context.users(value))
        return _mapped(given, lambda value: value if _SESSION.fullmatch(value) else context.key.session(value))


class Time(Leave, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Integers, rounded down."""

    to_ms: Annotated[int, msgspec.Meta(gt=0)]

    def of_column(self, given: pa.ChunkedArray, _: Context, __: frozenset[str], /) -> pa.ChunkedArray:
        """See `Leave`."""
        whole = pc.cast(given, pa.int64())
        # Arrow divides towards zero: what lies below zero comes out one step too high.
        rest = pc.subtract(whole, pc.multiply(pc.divide(whole, self.to_ms), self.to_ms))
        floored = pc.subtract(pc.subtract(whole, rest), pc.if_else(pc.less(rest, 0), self.to_ms, 0))
        return pc.cast(floored, given.type)


class Step(Leave, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Numbers, rounded to the nearest multiple."""

    step: Annotated[float, msgspec.Meta(gt=0)]

    def of_column(self, given: pa.ChunkedArray, _: Context, __: frozenset[str], /) -> pa.ChunkedArray:
        """See `Leave`."""
        steps = pc.round(pc.divide(pc.cast(given, pa.float64()), self.step))
        return pc.cast(pc.round(pc.multiply(steps, self.step), ndigits=9), given.type, safe=False)


class Cap(Leave, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Numbers, cut off above."""

    at: float

    def of_column(self, given: pa.ChunkedArray, _: Context, __: frozenset[str], /) -> pa.ChunkedArray:
        """See `Leave`."""
        return pc.if_else(pc.greater(given, self.at), pa.scalar(self.at).cast(given.type), given)


class Uuid7(Leave, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Ids of RFC 9562 version 7, made anew of a coarser clock; anything else becomes null."""

    to_ms: Annotated[int, msgspec.Meta(gt=0)]

    def of_column(self, given: pa.ChunkedArray, context: Context, _: frozenset[str], /) -> pa.ChunkedArray:
        """See `Leave`."""
        return _mapped(given, lambda value: _coarse_uuid7(value, context.key, self.to_ms))


class Text(Leave, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Scrubbed, and only where enough people said it."""

    min_users: Annotated[int, msgspec.Meta(ge=1)]
    of: str
    drop_row_where: dict[str, str] = {}

    def of_column(self, given: pa.ChunkedArray, _: Context, common: frozenset[str], /) -> pa.ChunkedArray:
        """See `Leave`; `common` holds the texts that enough people said."""
        return _mapped(given, lambda value: scrubbed if (scrubbed := _scrubbed(value)) in common else None)


_ACTIONS: Final[Mapping[str, type[Leave]]] = {"leave": Leave, "never": Never, "pseudonymise": Pseudonymise}
_RULES: Final[Mapping[str, type[Leave]]] = {"time": Time, "step": Step, "cap": Cap, "uuid7": Uuid7, "text": Text}


def _nobody(_: str) -> str | None:
    return None


@dataclass(frozen=True)
class Context:
    """What `apply` must know beyond its table; made by `Policy.context`."""

    key: PseudonymKey
    """For sessions and event ids."""
    users: Callable[[str], str | None] = _nobody
    """Raw user id -> pseudonym, None for nobody that home knows (`Vault.pseudonym`)."""
    common: Mapping[tuple[str, str], frozenset[str]] = field(default_factory=dict)
    """(table, column) -> the scrubbed texts that enough people typed; a text column that is not here has none."""


@dataclass(frozen=True)
class Policy:
    """Per table and column what is done to it."""

    tables: Mapping[str, Mapping[str, Leave]]
    source: str = "columns.toml"

    @classmethod
    def read(cls, path: Path = DEFAULT) -> Policy:
        """Read a policy file. Raises PolicyError naming the table, the column and what is wrong."""
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise PolicyError(f"{path}: cannot be read ({error.strerror})", "give the column policy's file") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise PolicyError(f"{path}: {error}", "correct the file; it is TOML") from None
        if document.keys() != {"version", "tables"} or document["version"] != 1:
            raise PolicyError(f"{path}: is no column policy of version 1", "begin from workloads/privacy/columns.toml")
        tables = {}
        for table, columns in document["tables"].items():
            actions = {name: _action(path, table, name, given) for name, given in columns.items()}
            for name, action in actions.items():
                if isinstance(action, Text):
                    for other in (action.of, *action.drop_row_where):
                        if other not in actions:
                            raise PolicyError(
                                f"{path}: {table}.{name} speaks of column {other!r}, which the policy does not name",
                                f"name a column of {table}",
                            )
            tables[table] = actions
        return cls(tables, str(path))

    def check(self, table_name: str, columns: Iterable[str]) -> None:
        """Refuse a table or column that the policy does not name. Raises PolicyError."""
        rules = self.tables.get(table_name)
        if rules is None:
            raise PolicyError(
                f"table {table_name!r} may not leave: {self.source} does not name it",
                f"decide about each of its columns under [tables.{table_name}]",
            )
        unknown = [name for name in columns if name not in rules]
        if unknown:
            raise PolicyError(
                f"column {unknown[0]!r} of table {table_name!r} may not leave: {self.source} does not name it",
                f"decide about {', '.join(repr(name) for name in unknown)} under [tables.{table_name}]: "
                "leave, pseudonymise, generalise or never",
            )

    def context(
        self,
        key: PseudonymKey,
        tables: Mapping[str, Iterable[pa.Table]],
        *,
        users: Callable[[str], str | None] = _nobody,
    ) -> Context:
        """The first pass: read every part of the tables once and count who typed what.

        `tables` holds the parts of each table by name, as `apply` will get them; memory is that of the distinct pairs
        of text and person. Raises PolicyError as `check`.
        """
        seen: dict[tuple[str, str], dict[str, set[str]]] = {}
        minima: dict[tuple[str, str], int] = {}
        for name, parts in tables.items():
            texts = {column: rule for column, rule in self.tables.get(name, {}).items() if isinstance(rule, Text)}
            for part in parts:
                self.check(name, part.column_names)
                for column, rule in texts.items():
                    if column not in part.column_names or rule.of not in part.column_names:
                        continue
                    people = seen.setdefault((name, column), {})
                    minima[name, column] = rule.min_users
                    pairs = part.select([column, rule.of]).group_by([column, rule.of]).aggregate([])
                    for text, person in zip(_plain(pairs[column]), _plain(pairs[rule.of]), strict=True):
                        if text is not None and person is not None:
                            people.setdefault(_scrubbed(text), set()).add(person)
        common = {}
        for (name, column), people in seen.items():
            least = minima[name, column]
            common[name, column] = frozenset(text for text, who in people.items() if text and len(who) >= least)
        return Context(key=key, users=users, common=common)

    def apply(self, table_name: str, table: pa.Table, context: Context) -> pa.Table:
        """What of this table may leave: same order of columns and rows, less of both; types as they were.

        Dictionary columns come back plain and metadata is dropped, because both can hold values that no row has any
        more. Raises PolicyError as `check`, and for a column whose type its rule does not know.
        """
        self.check(table_name, table.column_names)
        rules = self.tables[table_name]
        columns: dict[str, pa.ChunkedArray] = {}
        keep: pa.ChunkedArray | None = None
        for name in table.column_names:
            action, given = rules[name], _undictionaried(table[name])
            if isinstance(action, Never):
                continue
            try:
                columns[name] = action.of_column(given, context, context.common.get((table_name, name), frozenset()))
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, AttributeError) as error:
                raise PolicyError(
                    f"column {name!r} of table {table_name!r} is of type {given.type}, which the rule for it does not "
                    f"know ({error})",
                    f"correct [tables.{table_name}] in {self.source}",
                ) from None
            if (
                isinstance(action, Text)
                and action.drop_row_where
                and action.drop_row_where.keys() <= {*table.column_names}
            ):
                gone = pc.is_null(columns[name])
                for other, value in action.drop_row_where.items():
                    matches = pc.equal(_undictionaried(table[other]), pa.scalar(value))
                    gone = pc.and_(gone, pc.fill_null(matches, fill_value=False))
                keep = pc.invert(gone) if keep is None else pc.and_(keep, pc.invert(gone))
        out = pa.table(columns)
        return out if keep is None else out.filter(keep)


def _action(path: Path, table: str, column: str, given: object) -> Leave:
    where = f"{path}: {table}.{column}"
    remedy = "say do = leave, pseudonymise, generalise (with a rule) or never; see workloads/privacy/columns.toml"
    if not isinstance(given, dict):
        raise PolicyError(f"{where} is {given!r}", remedy)
    rest = dict(given)
    do = rest.pop("do", None)
    kind = _RULES.get(rest.pop("rule", None)) if do == "generalise" else _ACTIONS.get(do)
    if kind is None:
        named = given.get("rule") if do == "generalise" else do
        raise PolicyError(f"{where}: there is no {'rule' if do == 'generalise' else 'action'} {named!r}", remedy)
    try:
        return msgspec.convert(rest, kind)
    except msgspec.ValidationError as error:
        raise PolicyError(f"{where}: {error}", remedy) from None


def _mapped(given: pa.ChunkedArray, change: Callable[[str], str | None]) -> pa.ChunkedArray:
    """Each distinct string through `change` once."""
    if not (pa.types.is_string(given.type) or pa.types.is_large_string(given.type) or pa.types.is_null(given.type)):
        raise pa.ArrowTypeError("it holds no text")
    if pa.types.is_null(given.type):
        return given
    coded = pc.dictionary_encode(given.combine_chunks())
    if isinstance(coded, pa.ChunkedArray):
        coded = coded.combine_chunks()
    changed = pa.array([change(value) for value in coded.dictionary.to_pylist()], given.type)
    return pa.chunked_array([changed.take(coded.indices)], given.type)


def _undictionaried(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        return column.cast(column.type.value_type)
    if str(column.type) == "string_view":
        return column.cast(pa.large_string())
    return column


def _plain(column: pa.ChunkedArray) -> list[Any]:
    values: list[Any] = column.to_pylist()
    return values


def _scrubbed(text: str) -> str:
    """What is left of a text when what points at a person is taken out; single blanks."""
    return " ".join(_PRIVATE.sub(" ", text).split())


def _coarse_uuid7(value: str, key: PseudonymKey, to_ms: int) -> str | None:
    if _UUID7.fullmatch(value) is None:
        return None
    clock = int(value[:8] + value[9:13], 16)
    clock -= clock % to_ms
    rest = hmac.digest(key.secret, _EVENT + value.encode(), "sha256")[:10]
    number = clock << 80 | 7 << 76 | int.from_bytes(rest[:2], "big") >> 4 << 64 | 2 << 62
    number |= int.from_bytes(rest[2:], "big") >> 2
    text = f"{number:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
