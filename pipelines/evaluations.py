"""Held-out loss of any stage on any distribution, measured once and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

from lifelong_moe.config.run import RunConfig
from lifelong_moe.data.prepare import PreparedData
from lifelong_moe.data.windows import evaluation_windows
from lifelong_moe.evaluation.loss import EVALUATION_SCHEMA, evaluate
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.stages.runs import EvaluationStore
from lifelong_moe.storage.keys import content_key
from lifelong_moe.training.device import configured_device
from pipelines.workspace import Prepared


@dataclass(frozen=True)
class Evaluator:
    """Measures models on a run's distributions; what was measured before is looked up."""

    config: RunConfig
    data: PreparedData
    store: EvaluationStore
    console: Console
    distributions: list[str]
    """Those that are measured, in the run's order."""

    @classmethod
    def of(cls, prepared: Prepared, store: EvaluationStore, models: Sequence[str], console: Console) -> Evaluator:
        """On every distribution whose held-out text there is, or that all these models were measured on before.

        Args:
            prepared: The run.
            store: Where evaluations are.
            models: Keys that they are stored under.
            console: Where people read.
        """
        every = cls(prepared.config, prepared.data, store, console, prepared.config.evaluated)
        measured = [
            name
            for name in every.distributions
            if name in every.data.heldout or all(store.find(key, every.key(name)) is not None for key in models)
        ]
        return replace(every, distributions=measured)

    def key(self, distribution: str) -> str:
        """What a stored evaluation depends on besides the model."""
        settings: dict[str, Any] = {
            "schema": EVALUATION_SCHEMA,
            "heldout": self.data.records[distribution].heldout_hash,
            "tokenizer": self.data.tokenizer.hash,
            "tokens": self.config.evaluate.tokens,
            "context": self.config.model.context,
        }
        if self.config.routing.by_label:
            settings["label"] = distribution
        return content_key(settings)

    def missing(self, stage_key: str) -> list[str]:
        """Distributions that this stage was not measured on yet."""
        return [name for name in self.distributions if self.store.find(stage_key, self.key(name)) is None]

    def __call__(self, stage_key: str, title: str, load: Callable[[], LanguageModel]) -> dict[str, dict[str, Any]]:
        """Evaluations by distribution; the model is loaded only if one is missing."""
        missing = self.missing(stage_key)
        if missing:
            model = load().to(configured_device(self.config.trainer))
            with self.console.status(f"{title}: evaluating") as status:
                for name in missing:
                    status.update(f"{title}: evaluating on {name}")
                    heldout = self.data.heldout[name]
                    windows = evaluation_windows(heldout, self.config.model.context, self.config.evaluate.tokens)
                    batch = self.config.evaluate.batch_tokens
                    result = evaluate(model, windows, distribution=name, batch_tokens=batch)
                    self.store.add(stage_key, self.key(name), result.to_json())
        found = {name: self.store.find(stage_key, self.key(name)) for name in self.distributions}
        return {name: result for name, result in found.items() if result is not None}
