"""What MLflow calls to load a registered version and to ask it. This module is all the code that such a version names.

A version's folder holds no code and no pickle: its pointer leads to stages of safetensors and JSON, which are
verified as every command verifies them, signatures included.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lifelong_moe.config.routing.own import require_allowed
from lifelong_moe.config.routing.topk import CustomRouterConfig
from lifelong_moe.config.training import TrainerConfig
from lifelong_moe.data.text.documents import Document
from lifelong_moe.data.tokens.shards import tokenize_documents
from lifelong_moe.data.tokens.tokenizer import Tokenizer
from lifelong_moe.data.tokens.windows import evaluation_windows
from lifelong_moe.errors import ConfigError
from lifelong_moe.evaluation.loss import evaluate
from lifelong_moe.model.sampling import sample
from lifelong_moe.serving.prompts import prompt_ids, require_label
from lifelong_moe.store.pointer import open_pointer
from lifelong_moe.store.stages import CommittedStage, StageStore
from lifelong_moe.tracking.model_files import PARAMS
from lifelong_moe.training.loop.device import configured_device
from lifelong_moe.training.restore import load_model

OUTPUTS = ("text", "loss")
RANGES: dict[str, tuple[float, float]] = {
    "max_new_tokens": (1, 1 << 20),
    "temperature": (0, math.inf),
    "top_p": (0.01, 1),
    "seed": (0, 2**63 - 1),
}
"""Least and largest value of each parameter of sampling, as `generate` has them."""
LOSSES = ("nats_per_token", "bits_per_byte", "tokens", "bytes")
"""What is told of a text that is measured."""
EVALUATED_TOKENS = 8192
"""Tokens a forward pass: bounds the memory, whatever the text's length."""


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
        stage: Its model goes to the first GPU, where there is one.
    """

    def __init__(self, store: StageStore, stage: CommittedStage) -> None:
        if isinstance(stage.architecture.routing, CustomRouterConfig):
            require_allowed(stage.architecture.routing.mode)
        model = load_model(store, stage).requires_grad_(False).eval()
        self._stage, self._tokenizers = stage, store.tokenizers(stage)
        self._model = model.to(configured_device(TrainerConfig()))

    def predict(self, data: Any, params: Mapping[str, object] | None = None) -> list[str] | list[dict[str, float]]:
        """Continue each text, as `generate` does, or measure it, as `evaluate` does.

        Args:
            data: A data frame with one column of texts, as MLflow makes it of a list.
            params: Those of :data:`lifelong_moe.tracking.model_files.PARAMS`: ``output`` is ``text`` or ``loss``;
                ``label``, the domain of the texts, for routing by label; for texts ``max_new_tokens``,
                ``temperature``, ``top_p`` and ``seed``, with which each text is continued as if it were alone.

        Returns:
            For each text its continuation, or the numbers of :data:`LOSSES`.

        Raises:
            ConfigError: If a parameter is out of its range, or a text that is to be measured is empty.
        """
        given = {name: default for name, _, default in PARAMS} | dict(params or {})
        output, label = given["output"], None if given["label"] is None else str(given["label"])
        if output not in OUTPUTS:
            raise ConfigError(f"output={output}: must be one of {', '.join(OUTPUTS)}.")
        require_label(self._stage, label, "label")
        texts = [str(text) for text in data.iloc[:, 0]]
        if output == "loss":
            return [self._losses(text, label) for text in texts]
        sampling = {name: _within(name, given[name]) for name in RANGES}
        return [self._continuation(text, label, sampling) for text in texts]

    def _tokenizer(self, label: str | None) -> Tokenizer:
        """That of a text, which its label decides where stages added tokens."""
        return self._tokenizers[self._stage.architecture.vocabulary_of(label)]

    def _continuation(self, text: str, label: str | None, sampling: Mapping[str, Any]) -> str:
        tokenizer = self._tokenizer(label)
        ids = prompt_ids(self._stage, tokenizer, text)
        return tokenizer.decode([*sample(self._model, ids, distribution=label, **sampling)])

    def _losses(self, text: str, label: str | None) -> dict[str, float]:
        if not text:
            raise ConfigError("a text without a character has no loss.")
        shard = tokenize_documents([Document(text, "")], self._tokenizer(label))
        windows = evaluation_windows(shard, self._model.architecture.model.context, sys.maxsize)
        found = evaluate(self._model, windows, distribution=label, batch_tokens=EVALUATED_TOKENS)
        return {name: getattr(found, name) for name in LOSSES}


def _within(name: str, value: object) -> int | float:
    least, most = RANGES[name]
    # Written so that NaN is refused as well.
    if not isinstance(value, (int, float)) or not (least <= value <= most and value < math.inf):
        raise ConfigError(f"{name}={value}: must lie in [{least:g}, {most:g}].")
    return value
