"""Rows that could not be used: what is said of each, how many a run bears, and that each counts once.

bad        broken: `data.on_bad_row` says whether the run stops, `data.max_bad_fraction` how many it bears
dropped    left out on purpose (nothing to learn, too long with `data.on_long_row=drop`): counted, and no more
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from neva_jax.config import DataConfig
from neva_jax.data.rows import BadRow, DroppedRow
from neva_jax.data.sources import RowRef, Sources
from neva_jax.errors import UserError


@dataclass(frozen=True)
class BadRowReport:
    """A row that was met and could not be used.

    sample: number of the sample in the run in whose place it was met.
    kind: `bad` or `dropped`.
    id: what the row calls itself.
    where: file, row number and id, for a message.
    reason: what is wrong with it.
    """

    ref: RowRef
    sample: int
    kind: str
    id: str
    where: str
    reason: str

    @property
    def message(self) -> str:
        """Where and what, for people."""
        return f"{self.where}: {self.reason}"


def report(sources: Sources, ref: RowRef, sample: int, error: BadRow) -> BadRowReport:
    """What is to be said of a row that raised `error`."""
    kind = "dropped" if isinstance(error, DroppedRow) else "bad"
    return BadRowReport(ref, sample, kind, sources.row_id(ref), sources.describe(ref), str(error))


class BadRowCount:
    """Counts the distinct rows of a run that could not be used, and stops it when the configured bound is passed."""

    def __init__(self, sources: Sources, data: DataConfig, split: str, known: Iterable[dict[str, Any]] = ()):
        """`split`: train or val; `known`: the records of `RUN/bad_rows.jsonl` so far, of any split."""
        self.sources, self.data, self.split = sources, data, split
        found = {(one["source"], one["row"]): one["kind"] for one in known if one["split"] == split}
        self._seen, self.counts = set(found), Counter(found.values())
        self._last = ""  # message of the bad row that was found last

    def add(self, reports: Iterable[BadRowReport]) -> list[BadRowReport]:
        """Takes a batch's reports; returns those of rows that are new."""
        new = []
        for one in reports:
            if (key := (one.ref.source, one.ref.row)) not in self._seen:
                self._seen.add(key)
                self.counts[one.kind] += 1
                new.append(one)
                if one.kind == "bad":
                    self._last = one.message
        return new

    def check(self, reports: Sequence[BadRowReport], complete: bool) -> None:
        """Whether the run may go on after a batch with these reports; `complete`: whether the batch has its rows.

        Raises:
          UserError: the policy is `error` and there is a bad row, the fraction of bad rows is above the bound, or
            there is no good row far and wide.
        """
        bad, total = [one for one in reports if one.kind == "bad"], self.sources.row_count
        if bad and self.data.on_bad_row == "error":
            raise UserError(f"{bad[0].message}; mend the row, or set data.on_bad_row=skip")
        if bad and self._last and self.counts["bad"] > self.data.max_bad_fraction * total:
            raise UserError(
                f"{self.counts['bad']} of {total} rows are bad, more than data.max_bad_fraction="
                f"{self.data.max_bad_fraction}; the last: {self._last}"
            )
        if not complete:
            raise UserError(f"no good row in 100 places of the order; the last: {reports[-1].message}")

    def summary(self) -> str:
        """One line: how many rows of each kind there were."""
        return f"{self.counts['bad']} bad and {self.counts['dropped']} dropped of {self.sources.row_count} rows"

    def record(self, one: BadRowReport, step: int) -> dict[str, Any]:
        """A line of `RUN/bad_rows.jsonl`: met at `step`."""
        return {
            "step": step,
            "sample": one.sample,
            "split": self.split,
            "kind": one.kind,
            "source": one.ref.source,
            "file": self.sources.configs[one.ref.source].json or self.sources.configs[one.ref.source].records,
            "row": one.ref.row,
            "id": one.id,
            "message": one.reason,
        }
