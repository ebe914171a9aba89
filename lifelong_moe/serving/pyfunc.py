"""What MLflow calls to load a registered version and to ask it. This module is all the code that such a version names.

A version's folder holds no code and no pickle: its pointer leads to stages of safetensors and JSON, which are
verified as every command verifies them, signatures included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lifelong_moe.errors import ConfigError
from lifelong_moe.serving.model import StageModel
from lifelong_moe.serving.prompts import require_label
from lifelong_moe.store.pointer import open_pointer
from lifelong_moe.store.stages import CommittedStage, StageStore
from lifelong_moe.tracking.model_files import PARAMS

OUTPUTS = ("text", "loss")
RANGES: dict[str, tuple[float, float]] = {
    "max_new_tokens": (1, 1 << 20),
    "temperature": (0, math.inf),
    "top_p": (0.01, 1),
    "seed": (0, 2**63 - 1),
}
"""Least and largest value of each parameter of sampling, as `generate` has them."""


def _load_pyfunc(data_path: str, model_config: object = None) -> ServedStage:
    """MLflow's entry: the model in the folder ``data`` of a registered version.

    Raises:
        ConfigError: A configuration is given, or the stage needs a router of somebody's own that nobody has named.
        CorruptError: The stages are gone, changed, or not signed by a trusted key where there is one.
    """
    # MLflow takes it from the folder's own file too, which somebody else may have written.
    if model_config:
        raise ConfigError("model_config: a model of lifelong-moe has none; give params to predict.")
    return ServedStage(*open_pointer(Path(data_path)))


class ServedStage:
    """A committed stage that continues texts, or measures them.

    Args:
        store: Has the stage.
        stage: See :class:`~lifelong_moe.serving.model.StageModel`.
    """

    def __init__(self, store: StageStore, stage: CommittedStage) -> None:
        self._model = StageModel(store, stage)

    def predict(self, data: Any, params: Mapping[str, object] | None = None) -> list[str] | list[dict[str, float]]:
        """Continue each text, as `generate` does, or measure it, as `evaluate` does.

        Args:
            data: A data frame with one column of texts, as MLflow makes it of a list.
            params: Those of :data:`lifelong_moe.tracking.model_files.PARAMS`: ``output`` is ``text`` or ``loss``;
                ``label``, the domain of the texts, for routing by label; for texts ``max_new_tokens``,
                ``temperature``, ``top_p`` and ``seed``, with which each text is continued as if it were alone.

        Returns:
            For each text its continuation, or the numbers of :class:`~lifelong_moe.serving.model.TextLoss`.

        Raises:
            ConfigError: If a parameter is out of its range, or a text that is to be measured is empty.
        """
        given = {name: default for name, _, default in PARAMS} | dict(params or {})
        output, label = given["output"], None if given["label"] is None else str(given["label"])
        if output not in OUTPUTS:
            raise ConfigError(f"output={output}: must be one of {', '.join(OUTPUTS)}.")
        require_label(self._model.stage, label, "label")
        texts = [str(text) for text in data.iloc[:, 0]]
        if output == "loss":
            return [asdict(self._model.loss(text, label=label)) for text in texts]
        sampling: dict[str, Any] = {name: _within(name, given[name]) for name in RANGES}
        return [self._model.generate(text, label=label, **sampling) for text in texts]


def _within(name: str, value: object) -> int | float:
    least, most = RANGES[name]
    # Written so that NaN is refused as well.
    if not isinstance(value, (int, float)) or not (least <= value <= most and value < math.inf):
        raise ConfigError(f"{name}={value}: must lie in [{least:g}, {most:g}].")
    return value
