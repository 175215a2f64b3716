"""The style of all plots: colors, axes, and pages of panels.

Source: The colors of Okabe and Ito (2008), which color-blind people can tell apart. Information
is never in the color alone.

Figures are made without pyplot, whose state is global.
"""

import dataclasses
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BLUE, GREEN, ORANGE, RED, GRAY = "#0072B2", "#009E73", "#E69F00", "#D55E00", "#666666"
DPI = 120


def new_figure(width: int | float, height: int | float) -> Figure:
    """Returns an empty figure of a size in inches."""
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Axes) -> None:
    """Draws a light grid and no frame, and sets readable font sizes."""
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=11)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_fontsize(12)


@dataclasses.dataclass(frozen=True)
class PanelGrid:
    """A page of panels of one width, in rows. All lengths are in inches.

    Attributes:
      columns: The number of panels in a row.
      row_heights: The height of the panels of each row, from the top.
      panel_width: The width of every panel.
      column_gap: Between two columns.
      row_gap: Above each row; titles are drawn there.
      margin: At the left, at the right and at the bottom of the page.
      header: Above the gap of the first row, instead of the margin.
      group: The number of columns in a group; groups are two more gaps apart. By default all
        columns are one group.
    """

    columns: int
    row_heights: Sequence[float]
    panel_width: float
    column_gap: float
    row_gap: float
    margin: float
    header: float
    group: int | None = None

    @property
    def width(self) -> float:
        """The width of the page."""
        return self.left(self.columns - 1) + self.panel_width + self.margin

    @property
    def height(self) -> float:
        """The height of the page."""
        return self.bottom(len(self.row_heights) - 1) + self.margin

    def left(self, column: int) -> float:
        """Returns the distance of a column from the left edge of the page."""
        group_gaps = 2 * (column // (self.group or self.columns))
        return self.margin + column * self.panel_width + (column + group_gaps) * self.column_gap

    def bottom(self, row: int) -> float:
        """Returns the distance of the lower edge of a row from the top of the page."""
        return self.header + (row + 1) * self.row_gap + sum(self.row_heights[: row + 1])

    def new_figure(self) -> Figure:
        """Returns an empty page."""
        return new_figure(self.width, self.height)

    def add_panel(self, figure: Figure, row: int, column: int) -> Axes:
        """Adds the axes of a panel to a page."""
        return figure.add_axes(
            (
                self.left(column) / self.width,
                1 - self.bottom(row) / self.height,
                self.panel_width / self.width,
                self.row_heights[row] / self.height,
            )
        )
