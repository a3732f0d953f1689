"""The demonstration's page shows every part's command, result and pictures."""

from __future__ import annotations

from pathlib import Path

from matplotlib import pyplot as plt

from simulations.demo_page import PartResult, write_demo_page


def test_every_part_is_shown(tmp_path: Path) -> None:
    figure = plt.figure()
    figure.savefig(tmp_path / "federated.png")
    plt.close(figure)
    parts = [
        PartResult(
            "federated", "Sites fine-tune.", ["simulations.fed_sim", "project.rounds=2"], 61.4, "loss 2.9 -> 2.6",
            {"status": "ok", "eval_loss_after": 2.62954, "plots": [str(tmp_path / "federated.png")]},
        ),
        PartResult("split_training", "Gradients cross.", ["split.train"], 9.0, "8 steps", {"text": "one, two <three>"}),
    ]  # fmt: skip
    page = write_demo_page(tmp_path / "report.html", parts).read_text()
    assert "<td>Federated: loss 2.9 -&gt; 2.6</td><td>61</td>" in page
    assert "<td>Split training: 8 steps</td><td>9</td>" in page
    assert "<h2>Federated</h2>\n<p>Sites fine-tune.</p>" in page
    assert "<dt>command</dt><dd>python -m simulations.fed_sim project.rounds=2</dd>" in page
    assert page.count("data:image/png;base64,") == 1
    assert "<dt>text</dt><dd>one, two &lt;three&gt;</dd>" in page
    assert "<dt>torch</dt>" in page
