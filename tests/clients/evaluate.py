"""lm-eval on the items of `cloze.jsonl`: `python evaluate.py local-completions ADDRESS MODEL`, or `hf FOLDER DTYPE`.

Runs in a virtual environment with lm-eval. Prints one line of JSON: its version, the accuracy, and of each choice
its log probability and whether it is the greedy continuation. Every fifth item has a wrong word twice: a tie.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

ITEMS = Path(__file__).with_name("cloze.jsonl").resolve()
TASK = {
    "task": "cloze",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(ITEMS)}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_target": "{{answer}}",
    "doc_to_choice": "{{choices}}",
    "target_delimiter": " ",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}


def main(kind: str, where: str, what: str) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    options: dict[str, Any]
    if kind == "hf":
        options = {"pretrained": where, "dtype": what, "device": "cpu"}
    else:
        options = {"base_url": f"{where}/completions", "model": what, "num_concurrent": 1}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "cloze.yaml").write_text(json.dumps(TASK), encoding="utf-8")  # JSON is YAML
        tasks = TaskManager(include_path=folder, include_defaults=False)
        done = simple_evaluate(model=kind, model_args=options, tasks=["cloze"], task_manager=tasks, batch_size=1)
    samples = sorted(done["samples"]["cloze"], key=lambda sample: sample["doc_id"])
    scores = [[resp[0] for resp in sample["resps"]] for sample in samples]
    accuracy = {name: done["results"]["cloze"][f"{name},none"] for name in ("acc", "acc_norm")}
    plain = [[[float(log_probability), bool(best)] for log_probability, best in item] for item in scores]
    print(json.dumps({"version": version("lm_eval"), **accuracy, "scores": plain}))


if __name__ == "__main__":
    main(*sys.argv[1:])
