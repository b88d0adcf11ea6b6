"""What became of a source's rows: told at the start of a run, so that nothing is left out without a word."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

WARN_ABOVE = 0.05  # of the rows that were read; more of them dropped is worth a warning
REASONS = {  # count of Examples -> what is said of those rows
    "dropped": "too long",
    "uncuttable": "too long to be cut",
    "empty": "with nothing to learn",
    "identical": "with equal sides",
    "skipped": "bad",
    "outranked": "below data.keep_top",
}
ASKED = "outranked"  # the reason that is no loss: the config asks for it
ROUND = 64  # limits are suggested in multiples of this


class Summary(NamedTuple):
    """One source, measured."""

    where: str  # the key of the config: data.prompts
    counts: Mapping[str, int]  # kept, truncated, and those of REASONS
    median: int  # tokens of a row (of a pair: of its longer side) before it was cut, of those that could be encoded
    percentile_95: int
    longest: int
    limit: int  # tokens
    limit_key: str  # of the config: data.max_length
    bad: str = ""  # why the first bad row is bad
    used: int | None = None  # an evaluation: it takes this many of those kept
    packed: int | None = None  # rows that the kept ones were packed into

    @property
    def read(self) -> int:
        return self.counts["kept"] + self.left_out

    @property
    def left_out(self) -> int:
        return sum(self.counts.get(reason, 0) for reason in REASONS)

    def lines(self) -> list[str]:
        """One line of counts, one of lengths, and warnings."""
        kept, why = self.counts["kept"], self.reasons()
        said = [f"{self.where}: {self.read:,} read, {kept:,} kept"]
        said += [f"{self.left_out:,} dropped ({why})"] if why else []
        said += [f"{self.counts['truncated']:,} truncated"] if self.counts["truncated"] else []
        said += [f"the first {self.used:,} used"] if self.used is not None and self.used < kept else []
        said += [f"packed into {self.packed:,} row{'s' * (self.packed != 1)}"] if self.packed is not None else []
        return [", ".join(said), f"  {self.lengths()}", *self.warnings()]

    def reasons(self) -> str:
        """ "36 too long, 2 bad"."""
        return ", ".join(f"{self.counts[key]:,} {why}" for key, why in REASONS.items() if self.counts.get(key))

    def lengths(self) -> str:
        return (
            f"tokens: median {self.median:,}, 95th percentile {self.percentile_95:,}, longest {self.longest:,}; "
            f"limit {self.limit:,}"
        )

    def warnings(self) -> list[str]:
        """What to change where more than WARN_ABOVE of the rows are left out."""
        lost = self.left_out - self.counts.get(ASKED, 0)
        if lost <= WARN_ABOVE * self.read:
            return []
        share = f"warning: {self.where}: {lost / self.read:.0%} of its rows are dropped"
        return [f"{share}; {self.way_out()}"]

    def way_out(self) -> str:
        """The key that would keep most of what the commonest reason drops."""
        worst = max((reason for reason in REASONS if reason != ASKED), key=lambda reason: self.counts.get(reason, 0))
        if worst == "skipped":
            return f"the first bad row: {self.bad}" if self.bad else "data.skip_bad is true"
        if worst == "empty":
            return f"{self.counts[worst]:,} {REASONS[worst]}: their responses are empty"
        if worst == "identical":
            return f"{self.counts[worst]:,} {REASONS[worst]}: chosen and rejected are the same tokens"
        enough = math.ceil(max(self.percentile_95, self.limit + 1) / ROUND) * ROUND
        raised = f"{self.limit_key}={enough}" if self.limit_key == "data.max_length" else f"a last bucket of {enough}"
        where = "" if self.limit_key == "data.max_length" else f" in {self.limit_key}"
        cuts = ", data.too_long=truncate cuts them" if worst == "dropped" else ""
        return f"{raised}{where} keeps 95 %{cuts}"


def quantiles(lengths: np.ndarray) -> tuple[int, int, int]:
    """(median, 95th percentile, longest): lengths that occur; zeros where there are none."""
    if not len(lengths):
        return 0, 0, 0
    median, high = np.quantile(lengths, [0.5, 0.95], method="inverted_cdf")
    return int(median), int(high), int(lengths.max())
