"""A client that means no good costs the others no token; in time: `tests.speculative.verifier.hostile`."""

from __future__ import annotations

from tests.speculative.verifier.hostile import KINDS, compare

QUICK = ("project.synthetic.step_seconds=0.004", "project.synthetic.row_seconds=0.0001")


def test_the_others_get_their_own_texts_beside_a_hostile_client() -> None:
    report = compare(60, list(KINDS), 1, *QUICK)
    assert report.keys() == KINDS.keys()
    assert all(row["same_texts"] for row in report.values())
