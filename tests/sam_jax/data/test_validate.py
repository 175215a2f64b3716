"""Tests that validation reads every sample and counts unusable ones."""

import json

import numpy as np
import pytest

from sam_jax.data.example import BadSample, Example, Source
from sam_jax.data.validate import Finding, check, printable, summarize
from sam_jax.masks import rle

MASK = rle.encode(np.ones((4, 6), bool))
BROKEN = {"size": [4, 6], "counts": [25]}
SKIPPED = [
    BadSample("empty mask", "mask 0: no pixels"),
    BadSample("broken mask", "mask 2: cut short"),
    BadSample("empty mask", "mask 3: no pixels"),
]


class Fake(Source):
    """A source of three usable samples, one that cannot be read and one with a broken mask."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        if index == 1:
            raise BadSample("broken image", "cut short")
        masks = [MASK] * index if index != 3 else [MASK, BROKEN]
        image = np.zeros((4, 6, 3), np.uint8)
        return Example(image, masks, SKIPPED if index == 4 else ())

    def name(self, index):
        return f"{index}.jpg"


def test_every_sample_has_a_finding():
    findings = list(check(Fake()))
    assert [f.index for f in findings] == list(range(5))
    assert [f.reason for f in findings] == [None, "broken image", None, "broken mask", None]
    assert [f.masks for f in findings] == [0, 0, 2, 0, 4]
    assert str(findings[1]) == "1.jpg: broken image: cut short"
    assert "mask 1: counts[0] must be an int from 0 to 24" in str(findings[3])
    assert str(findings[2]) == "2.jpg: usable: 2 masks"
    assert str(findings[4]) == (
        "4.jpg: usable: 4 masks without 1 broken mask, 2 empty mask: mask 0: no pixels"
    )


def test_a_summary_can_be_written_as_json():
    summary = json.loads(json.dumps(summarize(check(Fake()))))
    bad = summary.pop("bad")
    assert summary == {
        "samples": 5,
        "usable": 3,
        "masks": 6,
        "reasons": {"broken image": 1, "broken mask": 1},
        "skipped_masks": {"empty mask": 2, "broken mask": 1},
        "used_in_part": [
            {
                "index": 4,
                "name": "4.jpg",
                "skipped_masks": {"broken mask": 1, "empty mask": 2},
                "detail": "mask 0: no pixels",
            }
        ],
    }
    assert bad[0] == {"index": 1, "name": "1.jpg", "reason": "broken image", "detail": "cut short"}


def test_reasons_come_most_frequent_first():
    reasons = ["no masks", "empty mask", "empty mask"]
    findings = [Finding(i, "x", reason=reason) for i, reason in enumerate(reasons)]
    assert list(summarize(findings)["reasons"].items()) == [("empty mask", 2), ("no masks", 1)]
    assert set(map(str, summarize([]).values())) == {"0", "{}", "[]"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/é ü.jpg", "a/é ü.jpg"),
        ("\x1b[31mred\n", "\\x1b[31mred\\n"),
        ("\udc80\u202e", "\\udc80\\u202e"),
    ],
)
def test_control_characters_are_escaped(text, expected):
    assert printable(text) == expected


def test_other_errors_are_not_hidden():
    class Faulty(Fake):
        def __getitem__(self, index):
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        list(check(Faulty()))
