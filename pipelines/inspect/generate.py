"""`lifelong-moe generate`: text that a stage writes, token by token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console

from lifelong_moe.errors import ConfigError
from lifelong_moe.serving.prompts import prompt_ids
from pipelines.inspect.opening import check_label, load_on_device, open_stage
from pipelines.shared.options import SamplingOptions
from pipelines.shared.output import print_text


def generate_text(
    run: str,
    stage: str | None,
    prompt: str,
    sampling: SamplingOptions,
    console: Console,
    *,
    label: str | None = None,
    int8: bool = False,
) -> Mapping[str, Any]:
    """Continue a text, or answer it as a prompt if the stage was fine-tuned; prints token by token.

    Args:
        run: A run.
        stage: Name of a committed stage; the last one if None.
        prompt: A prompt that holds the separator already begins the answer after it.
        sampling: Length, temperature, nucleus and seed.
        console: Where people read.
        label: Domain of the text, for routing by label.
        int8: Hold the weight matrices in 8 bits.
    """
    # Python hands over bytes of the command line that are not UTF-8 as lone surrogates.
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ConfigError("the prompt is not UTF-8.")
    store, committed = open_stage(run, stage)
    check_label(committed, label, console)
    from lifelong_moe.model.sampling import sample

    tokenizer = store.tokenizer(committed, label)
    model = load_on_device(run, store, committed, int8=int8)
    ids: list[int] = []
    shown = ""
    answers = committed.spec.finetune is not None
    print_text(console, prompt + "\n" * answers)
    ids_before = prompt_ids(committed, tokenizer, prompt)
    for token in sample(model, ids_before, distribution=label, **asdict(sampling)):
        ids.append(token)
        text = tokenizer.decode(ids)
        # A character may span several tokens; until it is complete, decoding ends in a replacement character.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print_text(console, text[len(shown) :])
            shown = text
    print_text(console, "\n")
    return {"run": run, "stage": committed.name, "prompt": prompt, "text": tokenizer.decode(ids), "tokens": len(ids)}
