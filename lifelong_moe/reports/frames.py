"""A run's report as pandas' data frames, which are imported on use: they take longer than a command may."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lifelong_moe.errors import ConfigError
from lifelong_moe.reports.report import BEFORE, Report
from lifelong_moe.storage.plain_files import require_plain_files
from lifelong_moe.store.runs import RunRecord, require_head

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pandas import DataFrame


@dataclass(frozen=True, repr=False)
class RunTables:
    """The numbers of a run's report."""

    run: str
    bits_per_byte: DataFrame
    """Held-out loss in bits per byte of source text, a row a stage after the untrained model's and a column a
    distribution."""
    nats_per_token: DataFrame
    """The same in nats per token."""
    stages: DataFrame
    """A row a stage: its data, key, experts, parameters, tokens, FLOPs, seconds, and what else training measured."""
    distributions: DataFrame
    """A row a distribution: bits per byte of the untrained and of the last model, forgetting (none where nothing came
    later), bytes per token."""

    def __repr__(self) -> str:
        return f"RunTables({self.run}: bits_per_byte, nats_per_token, stages, distributions)"


def report(run: str, *, store: str | Path = "mlruns") -> RunTables:
    """The report of a run, as ``lifelong-moe report`` shows it.

    Args:
        run: Its name.
        store: The folder of runs and stages.

    Raises:
        ConfigError: If there is no such run, or none of its stages is evaluated yet.
        CorruptError: If the store is damaged, or holds something that no store holds.
    """
    root = Path(store)
    require_plain_files(root)
    require_head(root, run)
    found = RunRecord(root, run).report(Report.from_json)
    if found is None:
        raise ConfigError(f"run {run} has no report yet: no stage is committed and evaluated.")
    return tables(found)


def tables(found: Report) -> RunTables:
    """A report as data frames."""
    from pandas import DataFrame

    names, after = list(found.distributions), [BEFORE, *(stage.name for stage in found.stages)]

    def losses(untrained: Sequence[float], later: Sequence[Sequence[float]]) -> DataFrame:
        return DataFrame([untrained, *later], index=after, columns=names)

    bits = losses(found.bits_per_byte_at_init, found.bits_per_byte)
    # What training measured has a column of its own, but for what is not one value.
    rows = [asdict(stage) for stage in found.stages]
    measured = [row.pop("training") for row in rows]
    rows = [
        row | {key: value for key, value in more.items() if isinstance(value, int | float | str)}
        for row, more in zip(rows, measured, strict=True)
    ]
    return RunTables(
        run=found.run,
        bits_per_byte=bits,
        nats_per_token=losses(found.loss_at_init, found.loss_nats_per_token),
        stages=DataFrame(rows).set_index("name"),
        distributions=DataFrame(
            {
                "untrained_bits_per_byte": bits.iloc[0],
                "final_bits_per_byte": bits.iloc[-1],
                "forgetting_bits_per_byte": {name: found.forgetting_bits_per_byte.get(name) for name in names},
                "bytes_per_token": dict(found.bytes_per_token),
            },
            index=names,
            dtype=float,
        ),
    )
