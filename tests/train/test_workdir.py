"""The files in the workdir of a run."""

import json

from train.workdir import write_evaluation


def test_values_that_are_not_finite_are_written_as_null(tmp_path):
    evaluation = {
        "loss": float("nan"),
        "clicks": {"1": {"chosen": 0.5, "oracle": float("inf")}},
        "images": 3,
        "index": ":",
    }
    write_evaluation(tmp_path, evaluation, [])
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]
    assert json.loads((tmp_path / "evaluation.json").read_text()) == {
        "loss": None,
        "clicks": {"1": {"chosen": 0.5, "oracle": None}},
        "images": 3,
        "index": ":",
    }
