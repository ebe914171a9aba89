"""The runs of a comparison, each planned before any of them is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lifelong_moe.config.run import RunConfig
from lifelong_moe.data.tokens.prepare import PreparedData
from lifelong_moe.errors import ConfigError
from lifelong_moe.plan.budget import tokens_within
from lifelong_moe.plan.comparison import Arm, Budget, Comparison, require_equal_measures
from lifelong_moe.reports.report import as_written
from lifelong_moe.storage.keys import SHORT
from lifelong_moe.store.runs import RunRecord
from lifelong_moe.store.stages import StageStore
from pipelines.shared.workspace import ROOT, Prepared, prepare

Memory = dict[str, PreparedData]


@dataclass(frozen=True)
class Job:
    """One arm with one seed: a run."""

    arm: Arm
    seed: int
    run: str
    prepared: Prepared
    """Its whole configuration, including tokens that follow from the budget, with data and plan."""

    def report(self) -> Mapping[str, Any] | None:
        """The run's report, if all stages of exactly this plan are committed."""
        record, keys = RunRecord(ROOT, self.run), [planned.key for planned in self.prepared.plan]
        head = record.head()
        complete = head is not None and list(head.plan) == keys and head.is_finished
        return record.report(as_written) if complete else None

    def is_taken(self) -> bool:
        """Whether the run's name refers to other stages."""
        # A plan that extends the run's, or ends earlier, is no conflict: `run` goes on with it.
        head, keys = RunRecord(ROOT, self.run).head(), [planned.key for planned in self.prepared.plan]
        return head is not None and any(old != new for old, new in zip(head.plan, keys, strict=False))


def plan_jobs(comparison: Comparison, memory: Memory) -> list[Job]:
    """All runs, seed by seed, so that what is committed first can be compared.

    Args:
        comparison: Its arms are already validated; here they are checked against data and machine.
        memory: Filled with the data that was read.

    Raises:
        ConfigError: Naming the arm.
    """
    # The first seed stands for all in these checks: seeds change neither data nor cost.
    seed = comparison.settings.seeds[0]
    # A device that this machine lacks is refused before text is read, and so before hours of training on other arms.
    begins = [arm for arm in comparison.arms if not _is_finished(comparison, arm)]
    for arm in begins:
        with _in_arm(arm):
            _require_trainer(comparison.configure(comparison.overrides(arm, seed)).config)
    first = {arm.name: _prepare(comparison, arm, comparison.overrides(arm, seed), memory) for arm in comparison.arms}
    store = StageStore(ROOT)
    for arm in comparison.arms:
        # Other text makes other stages of an arm that was finished.
        if arm not in begins and any(store.find(planned.key) is None for planned in first[arm.name].plan):
            with _in_arm(arm):
                _require_trainer(first[arm.name].config)
    require_equal_measures({name: _measures(first[name]) for name in [comparison.reference, *first]})
    tokens = {arm.name: _token_overrides(comparison, arm, first) for arm in comparison.arms}
    jobs = []
    for seed in comparison.settings.seeds:
        for arm in comparison.arms:
            overrides = comparison.overrides(arm, seed) + tokens[arm.name]
            prepared = _prepare(comparison, arm, overrides, memory)
            jobs.append(Job(arm, seed, comparison.run_name(arm, seed), prepared))
    return jobs


def _is_finished(comparison: Comparison, arm: Arm) -> bool:
    """Whether an arm's runs are: it may need no torch."""
    heads = [RunRecord(ROOT, comparison.run_name(arm, seed)).head() for seed in comparison.settings.seeds]
    return all(head is not None and head.is_finished for head in heads)


def _require_trainer(config: RunConfig) -> None:
    from lifelong_moe.training.loop.device import require_trainer  # imports torch

    require_trainer(config.trainer)


def _measures(prepared: Prepared) -> dict[str, str]:
    """What the losses are measured on: hashes of the tokenizer and of the held-out texts."""
    # Arms must agree on them, or their losses per token do not compare. Settings were compared on loading.
    heldout = {name: record.heldout_hash for name, record in prepared.data.records.items()}
    found = {f"distributions.{name} (SHA-256 of its held-out text)": text for name, text in heldout.items()}
    return {key: text[:SHORT] for key, text in ({"tokenizer (SHA-256)": prepared.data.tokenizer.hash} | found).items()}


def refuse_taken_names(jobs: list[Job]) -> None:
    """Check that no run would change the stages that its name refers to.

    Raises:
        ConfigError: If one of the names is in use for other stages.
    """
    for job in jobs:
        if job.is_taken():
            raise ConfigError(
                f"arm {job.arm.name}: run {job.run} exists with another configuration or other data. Choose "
                f"compare=NAME, or --replace to let its name refer to the new stages."
            )


def _prepare(comparison: Comparison, arm: Arm, overrides: list[str], memory: Memory) -> Prepared:
    with _in_arm(arm):
        return prepare(comparison.configure(overrides), memory)


def _token_overrides(comparison: Comparison, arm: Arm, prepared: dict[str, Prepared]) -> list[str]:
    """Overrides of the stages' tokens that keep an arm within the reference's FLOPs."""
    if comparison.settings.budget == Budget.tokens or arm.name == comparison.reference:
        return []
    own, reference = prepared[arm.name], prepared[comparison.reference]
    configured = {str(stage.name): stage.tokens for stage in own.config.stages}
    with _in_arm(arm):
        base = None if own.base is None else own.base.architecture
        allowed = tokens_within(own.plan, reference.plan, configured, base)
    return [f"stages[{i}].tokens={allowed[name]}" for i, name in enumerate(configured)]


@contextmanager
def _in_arm(arm: Arm) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"arm {arm.name}: {error}") from None
