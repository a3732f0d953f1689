"""The demonstration's page shows every part's figures and pictures."""

from __future__ import annotations

from pathlib import Path

from matplotlib import pyplot as plt

from simulations.demo_page import facts, write_demo_page


def test_every_part_is_shown(tmp_path: Path) -> None:
    figure = plt.figure()
    figure.savefig(tmp_path / "federated.png")
    plt.close(figure)
    parts = {
        "federated": {"status": "ok", "eval_loss_after": 2.62954, "plots": [str(tmp_path / "federated.png")]},
        "speculative": {"text": "one, two <three>", "alpha": 0.98, "token_ids": list(range(40)), "new_tokens": 64},
    }
    page = write_demo_page(tmp_path / "report.html", parts).read_text()
    assert "<h2>Federated</h2>" in page
    assert "<dt>eval loss after</dt><dd>2.63</dd>" in page
    assert page.count("data:image/png;base64,") == 1
    assert "one, two &lt;three&gt;" in page
    assert "<dt>alpha</dt><dd>0.980</dd>" in page
    assert "token ids" not in page
    assert "<dt>torch</dt>" in page


def test_facts_are_what_one_reads() -> None:
    shown = facts({"status": "ok", "losses": [1.5, 2.0], "bytes": 12345, "flips": None, "nested": {"a": 1}, "ok": True})
    assert shown == {"losses": "1.50, 2.00", "bytes": "12,345", "ok": "yes"}
