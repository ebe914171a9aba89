"""A finished run of three kinds of text and an inbox beside it, for tests of what comes after a run."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import yaml

from lifelong_moe.plan.retraining import load_retraining
from pipelines.retrain.retrain import retrain
from pipelines.shared.output import SafeConsole
from tests.tiny import (
    CONTEXT,
    SEQUENCES,
    STEPS,
    VOCABULARIES,
    tiny_config,
    train,
    write_config,
    write_corpora,
    write_corpus,
)

TOKENS = 5 * STEPS * SEQUENCES * CONTEXT
RETRAIN: dict[str, Any] = {
    "base": "tiny.yaml",
    "inbox": {"path": "inbox"},
    "trigger": {"min_tokens": 500},
    "probe": {"fraction": 0.3},
    "drift": {"documents": 100, "permutations": 199},
    # Words of these texts are drawn at random, so that order within a document is worth little.
    "decision": {"min_structure": 0.1},
    "gate": {"resamples": 500},
}


def base_config(**sections: Any) -> dict[str, Any]:
    """Two stages with bundles, on which nothing that comes later can make the old text worse."""
    config = tiny_config(("fruit", "code"))
    config["model"] |= {"document_mask": True, "experts": 4}
    # One generation is selected for each chunk, so that what each action does to old text can be told beforehand.
    config["routing"] |= {"bundles": "cluster", "mixture": None, "chunk_tokens": 4}
    config["stage_defaults"] |= {
        "tokens": TOKENS,
        "trunk": {"train": "deltas", "rank": 4},
        "replay": {"fraction": 0.0},
        "distill": {"weight": 0.0},
    }
    config["evaluate"] = {
        "tokens": 2_000
    }  # documents of code and sea have a hundred tokens, and the gate needs several
    for name, value in sections.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    return config


def three_stages() -> dict[str, Any]:
    """The same with fewer tokens, and a third stage."""
    config = base_config()
    config["stage_defaults"]["tokens"] = STEPS * SEQUENCES * CONTEXT
    config["distributions"]["sea"] = {"files": "sea.jsonl", "heldout_fraction": 0.1}
    return config | {"stages": [{"data": "fruit"}, {"data": "code"}, {"data": "sea"}]}


def make_base(root: Path, **sections: Any) -> None:
    """Train the base in the current directory, and write ``retrain.yaml``."""
    write_corpora(root)
    write_config(base_config(**sections))
    train()
    write_retraining()
    Path("inbox").mkdir()


def write_retraining(**sections: Any) -> None:
    """``retrain.yaml``, sections merged one level deep."""
    config = {**RETRAIN}
    for name, value in sections.items():
        config[name] = {**config.get(name, {}), **value} if isinstance(value, dict) else value
    Path("retrain.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def tick(*overrides: str, dry_run: bool = False, plan: str | None = None, reopen: str | None = None) -> dict[str, Any]:
    """One tick in this process."""
    return tick_and_text(*overrides, dry_run=dry_run, plan=plan, reopen=reopen)[0]


def tick_and_text(
    *overrides: str,
    dry_run: bool = False,
    plan: str | None = None,
    reopen: str | None = None,
    config: str = "retrain.yaml",
) -> tuple[dict[str, Any], str]:
    """One tick, and what it printed."""
    printed = io.StringIO()
    outcome = retrain(load_retraining(config, overrides), dry_run, plan, SafeConsole(printed, width=1000), reopen)
    result = outcome.to_json()
    json.dumps(result, allow_nan=False)
    return result, printed.getvalue()


def arrive(kind: str, name: str = "new.jsonl", seed: int = 77, documents: int = 160) -> Path:
    """Documents of a kind come into the inbox."""
    path = Path("inbox") / name
    if kind == "noise":
        draw = random.Random(seed)
        texts = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=150)) for _ in range(documents)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    else:
        write_corpus(path, VOCABULARIES[kind].split(), seed, documents)
    return path


def head() -> dict[str, Any]:
    """The run's head."""
    return json.loads(Path("mlruns/runs/tiny/head.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def change_head(**changes: Any) -> None:
    """Write other fields into the run's head, by hand."""
    text = json.dumps({**head(), **changes})
    Path("mlruns/runs/tiny/head.json").write_text(text, encoding="utf-8")


def ledger() -> list[dict[str, Any]]:
    """Events of the run."""
    return [json.loads(line) for line in Path("mlruns/runs/tiny/ledger.jsonl").read_text().splitlines()]


def stages() -> set[str]:
    """Committed stages by directory name."""
    return {path.name for path in Path("mlruns/stages").glob("[!.]*")}
