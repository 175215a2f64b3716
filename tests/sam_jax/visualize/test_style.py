"""Tests figures with several panels."""

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from sam_jax.visualize.style import PanelGrid


def test_panels_are_on_the_grid_and_do_not_overlap():
    grid = PanelGrid(
        columns=4,
        row_heights=[1.0, 2.0],
        panel_width=1.5,
        column_gap=0.1,
        row_gap=0.3,
        margin=0.2,
        header=0.5,
        group=2,
    )
    # Two groups of two panels are separated by two more gaps.
    assert grid.width == pytest.approx(0.2 + 4 * 1.5 + 3 * 0.1 + 2 * 0.1 + 0.2)
    assert grid.height == pytest.approx(0.5 + 0.3 + 1 + 0.3 + 2 + 0.2)
    figure = grid.new_figure()
    assert figure.get_size_inches().tolist() == pytest.approx([grid.width, grid.height])
    for row in range(2):
        boxes = [grid.add_panel(figure, row, column).get_position() for column in range(4)]
        left = np.array([box.x0 for box in boxes]) * grid.width
        np.testing.assert_allclose(left, [0.2, 1.8, 3.6, 5.2], atol=1e-9)
        for box in boxes:
            assert box.width * grid.width == pytest.approx(1.5)
            assert box.height * grid.height == pytest.approx(grid.row_heights[row])
            assert (1 - box.y1) * grid.height == pytest.approx([0.8, 2.1][row])
