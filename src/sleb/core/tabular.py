"""Results as a table or a picture, for notebooks. Needs pandas or matplotlib where these are asked
for, and nothing before."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from sleb.core.errors import InputError
from sleb.core.printable import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

LONGEST = 200  # characters of a cell


@dataclass(frozen=True, kw_only=True)
class Points:
    """What a result is drawn as: values ``y`` at ``x``, with the ends of their intervals where
    there are some, and what the axes are."""

    x: tuple[Any, ...]
    y: tuple[float, ...]
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]
    x_label: str
    y_label: str


class Tabular:
    """A result that has rows."""

    def rows(self) -> list[dict[str, Any]]:
        """Its figures, a row each by the name of the column."""
        raise NotImplementedError

    def drawn(self) -> Points:
        """What :meth:`plot` draws."""
        raise NotImplementedError

    def to_pandas(self) -> DataFrame:
        """The rows as a data frame.

        Raises:
            InputError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise InputError("a data frame needs pandas: pip install pandas") from None
        return pd.DataFrame(self.rows())

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the result, with its intervals, on ``ax`` or a new figure; give the axes back.

        Raises:
            InputError: matplotlib is not installed.
        """
        try:
            import matplotlib.pyplot as plt
        except ImportError:
            raise InputError("a plot needs matplotlib: pip install matplotlib") from None
        found = self.drawn()
        if ax is None:
            _, ax = plt.subplots(figsize=(6, 3.5), layout="constrained")
        ends = zip(found.y, found.low, found.high, strict=True)
        reach = [(y - a, b - y) for y, a, b in ends if a is not None and b is not None]
        errors = [*zip(*reach, strict=True)] if len(reach) == len(found.y) else None
        ax.errorbar(found.x, found.y, yerr=errors, marker="o", capsize=3)
        ax.set_xlabel(found.x_label)
        ax.set_ylabel(found.y_label)
        return ax

    def _repr_html_(self) -> str:
        rows = self.rows()
        names = list(dict.fromkeys(name for row in rows for name in row))
        head = "".join(f"<th>{escape(name)}</th>" for name in names)
        body = "".join(
            f"<tr>{''.join(f'<td>{_cell(row.get(name))}</td>' for name in names)}</tr>"
            for row in rows
        )
        title = escape(printable(str(self).splitlines()[0], LONGEST))
        return f"<p>{title}</p><table><tr>{head}</tr>{body}</table>"


def _cell(value: Any) -> str:
    shown = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return escape(printable(shown, LONGEST))
