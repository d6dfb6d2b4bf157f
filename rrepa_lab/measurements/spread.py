"""Mean and spread over training seeds."""

from collections.abc import Sequence

import pandas as pd


def mean_and_spread(table: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Mean (`value`), sample standard deviation (`sd`, nan of one row) and number (`seeds`) of the rows with equal keys.

    Args:
        table: with a column `value`.
        keys: columns; rows with equal ones are of the same setting and differ by their training seed.

    Returns: one row for each combination of keys, in the order of the table, indexed by them.

    Example:
        >>> table = pd.DataFrame({"run": ["a", "a", "b"], "value": [1.0, 3.0, 5.0]})
        >>> mean_and_spread(table, ["run"]).value.tolist()
        [2.0, 5.0]
    """
    values = table.groupby(list(keys), sort=False, dropna=False)["value"]
    return pd.DataFrame({"value": values.mean(), "sd": values.std(), "seeds": values.size()})


def spread_text(value: float, sd: float, form: str = ".4f") -> str:
    """ "0.1234 ± 0.0012"; the mean alone where there is no spread."""
    return f"{value:{form}}" if pd.isna(sd) else f"{value:{form}} ± {sd:{form}}"
