"""Tasks of lm-evaluation-harness: found by file or name, without a network, and the scores of a model on each.

A task is code: its file may name functions of Python files, and its templates are expressions that nothing confines.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lm_eval
import numpy as np
from lm_eval.api.metrics import mean
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager

from lifelong_moe.errors import ConfigError, LifelongError
from lifelong_moe.evaluation.harness import HarnessModel
from lifelong_moe.redaction import shortened
from lifelong_moe.storage.keys import content_key, text_sha256

TASK_SCHEMA = 1
"""Version of how tasks are put to a model; a change invalidates every stored score."""
MOST_REASON = 300
"""Characters of an error of the harness that are shown."""


@dataclass(frozen=True)
class TaskScores:
    """A model's scores on one task."""

    scores: Mapping[str, float]
    """By metric, as the harness names it, with the filter's name after a comma if there is one."""
    standard_errors: Mapping[str, float]
    """Of the scores that are means."""
    documents: int
    """Questions or texts."""


@dataclass(frozen=True)
class LoadedTask:
    """A task that can be put to models."""

    name: str
    task: Any
    """The harness's own object."""
    higher_is_better: Mapping[str, bool]
    """By metric, where it is known."""

    def key(self, how: Mapping[str, object]) -> str:
        """Hash of everything besides the model that scores depend on; ``how`` says how it reads the task."""
        settings = {"schema": TASK_SCHEMA, "harness": lm_eval.__version__, "how": dict(how)}
        return content_key(settings | {"task": text_sha256(_plain(self.task.dump_config())), "text": self._text()})

    def _text(self) -> str:
        shots = self.task.fewshot_docs() if self.task.config.num_fewshot else []
        return text_sha256(_plain([[*self.task.eval_docs], [*(shots or ())]]))


def load_tasks(files: Sequence[str], names: Sequence[str]) -> list[LoadedTask]:
    """Load tasks and what they read.

    Args:
        files: YAML files of tasks or groups.
        names: Tasks, groups or tags that the harness has. To find them takes it half a minute.

    Raises:
        ConfigError: There is no such task, it cannot be loaded (it may need a network), or it runs what models write.
    """
    # As the harness's own command does: some tasks shuffle.
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    manager = TaskManager(include_defaults=bool(names))
    loaded: dict[str, LoadedTask] = {}
    for given in (*files, *names):
        for name, task in _found(manager, given).items():
            if name in loaded:
                raise ConfigError(f"--tasks={given}: there are two tasks {name}.")
            loaded[name] = LoadedTask(name, task, task.higher_is_better())
    return [*loaded.values()]


def _found(manager: TaskManager, given: str) -> Mapping[str, Any]:
    try:
        found: Mapping[str, Any] = manager.load([given])["tasks"]
        for task in found.values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            # Mistakes in templates are found here, before a model is loaded.
            task.build_all_requests(limit=1, rank=0, world_size=1)
    except LifelongError:
        raise
    except Exception as error:  # of the harness, of libraries that load datasets, of a task's own code
        reason = shortened(" ".join(f"{type(error).__name__}: {error}".split()), MOST_REASON)
        raise ConfigError(f"--tasks={given}: cannot be loaded: {reason}") from error
    for name, task in found.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(f"--tasks={given}: {name} runs code that models write, which is not done here.")
    return found


def measure_task(model: HarnessModel, loaded: LoadedTask) -> TaskScores:
    """A model's scores on a task; what is not finite is left out."""
    from lm_eval.evaluator import evaluate

    # Every model gets the same examples, however many were drawn before.
    loaded.task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    # Standard errors of means have a formula; others are estimated by processes that draw samples, which are not begun.
    aggregations = [*loaded.task.aggregation().values()]
    draws = int(all(one is mean for one in aggregations))
    found = evaluate(model, {"tasks": {loaded.name: loaded.task}}, bootstrap_iters=draws, log_samples=False)
    scores: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in found["results"][loaded.name].items():
        metric, comma, kind = key.partition(",")
        # Text beside the scores, such as the task's alias, has keys without a filter.
        if not comma or isinstance(value, str) or not math.isfinite(value):
            continue
        name = metric.removesuffix("_stderr") + ("" if kind == "none" else f",{kind}")
        (errors if metric.endswith("_stderr") else scores)[name] = float(value)
    return TaskScores(scores, errors, int(found["n-samples"][loaded.name]["effective"]))


def _plain(value: Any) -> str:
    """Canonical text of what a task holds; of a function its name, of other objects their kind."""
    return json.dumps(value, sort_keys=True, default=lambda one: getattr(one, "__qualname__", type(one).__name__))
