"""What a stage is asked: a text as a prompt's tokens, and the label of its text. Torch-free."""

from __future__ import annotations

from lifelong_moe.data.text.jsonl import SEPARATOR
from lifelong_moe.data.tokens.tokenizer import Tokenizer
from lifelong_moe.errors import ConfigError
from lifelong_moe.store.stages import CommittedStage


def prompt_ids(stage: CommittedStage, tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a text, without BOS; a fine-tuned stage reads it as a prompt to answer, others continue it.

    Args:
        stage: That is asked.
        tokenizer: Its own.
        text: One that holds the separator already begins the answer after it.
    """
    # Training pairs were encoded as prompt, separator, answer.
    asks = stage.spec.finetune is not None and SEPARATOR not in text
    return tokenizer.encode(f"{text}{SEPARATOR}" if asks else text)


def require_label(stage: CommittedStage, label: str | None, given: str) -> None:
    """Check the label of a text against a stage's routing.

    Args:
        stage: That is asked.
        label: Domain of the text; None if it is unknown.
        given: How the user names it, such as ``--label``.

    Raises:
        ConfigError: If the routing ignores labels, or does not know this one.
    """
    architecture, routing = stage.architecture, stage.architecture.routing
    known = [name for name, _ in architecture.labels]
    # With one generation there is nothing to select, so its label is right in any mode.
    if label is None or (label in known and len(architecture.generations) == 1):
        return
    if not routing.by_label:
        raise ConfigError(f"{given}={label}: routing.mode={routing.mode} ignores labels; leave it out.")
    if label not in known:
        raise ConfigError(f"{given}={label} is unknown to stage {stage.name}; there are {', '.join(known)}.")
