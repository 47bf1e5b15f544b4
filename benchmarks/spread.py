"""How far the ratios of single rounds lie apart."""

from collections.abc import Sequence

from .rounds import Row, quartiles


def add_spread(rows: Sequence[Row]) -> None:
    """Give each row that is compared the quartiles of its ratios within the rounds, `ratio_q1` and `ratio_q3`."""
    by_provider = {row.provider: row for row in rows}
    for row in rows:
        if row.ratio is not None:
            pairs = zip(row.seconds, by_provider[row.over].seconds, strict=True)
            q1, _, q3 = quartiles([seconds / baseline for seconds, baseline in pairs])
            row.facts |= {"ratio_q1": q1, "ratio_q3": q3}
