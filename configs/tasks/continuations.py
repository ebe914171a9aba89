"""Make a task for lm-evaluation-harness of each distribution's held-out text: which of four ends continues a text?

    PYTHONPATH=$PWD python configs/tasks/continuations.py configs/quickstart.yaml

writes ``data/tasks/RUN_DISTRIBUTION.yaml`` and its questions for a run's configuration, and prints the files. The run
is not trained on this text. The wrong ends are from other documents of the same distribution, so the kind of text alone
tells nothing. Equal text gives equal questions.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lifelong_moe.config.load import read_config
from lifelong_moe.data.text.sources import read_corpus
from lifelong_moe.errors import DataError
from lifelong_moe.interop.layout.complete import with_checkpoint
from lifelong_moe.storage.files import write_atomic
from pipelines.shared.places import CACHE

FOLDER = Path("data/tasks")
QUESTIONS = 200
"""A standard error of at most 3.5 points of accuracy."""
BEFORE, END = 32, 8
"""Words of the text, and of each end."""


def questions(texts: Sequence[str], seed: int = 0) -> Iterator[dict[str, Any]]:
    """Questions over documents, each of which is asked of in turn.

    Raises:
        DataError: Fewer than four documents are long enough.
    """
    draw = random.Random(seed)
    # Blanks tell documents apart without a model: they are all one space.
    documents = [words for words in (text.split() for text in texts) if len(words) >= BEFORE + END]
    if len(documents) < 4:
        raise DataError(f"only {len(documents)} held-out documents have {BEFORE + END} words; four are needed.")
    for number in range(QUESTIONS):
        place = number % len(documents)
        first = draw.randrange(len(documents[place]) - BEFORE - END + 1) + BEFORE
        others = draw.sample([one for i, one in enumerate(documents) if i != place], 3)
        starts = [draw.randrange(len(one) - END + 1) for one in others]
        right = " ".join(documents[place][first : first + END])
        wrong = [" ".join(one[start : start + END]) for one, start in zip(others, starts, strict=True)]
        if right in wrong:  # a phrase that documents share
            continue
        choices = [right, *wrong]
        draw.shuffle(choices)
        text = " ".join(documents[place][first - BEFORE : first])
        yield {"text": text, "choices": choices, "answer": choices.index(right)}


def task(name: str, questions_path: Path) -> dict[str, Any]:
    """The harness's settings of such a task."""
    metrics = [{"metric": one, "aggregation": "mean", "higher_is_better": True} for one in ("acc", "acc_norm")]
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions_path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "num_fewshot": 0,
        "doc_to_text": "{{text}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": metrics,
        "metadata": {"version": 1},
    }


def main(config_path: str) -> None:
    """Write the tasks of a run's configuration."""
    config = read_config(config_path, [], with_checkpoint).config
    for name in config.evaluated:
        corpus = read_corpus(name, config.distributions[name], CACHE)
        rows = "".join(json.dumps(row) + "\n" for row in questions([one.text for one in corpus.heldout]))
        path = FOLDER / f"{config.run}_{name}.yaml"
        write_atomic(path.with_suffix(".jsonl"), rows, corpus.mode)
        settings = task(f"{config.run}_{name}", path.with_suffix(".jsonl"))
        write_atomic(path, yaml.safe_dump(settings, sort_keys=False), corpus.mode)
        print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
