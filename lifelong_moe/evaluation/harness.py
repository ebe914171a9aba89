"""Models as lm-evaluation-harness calls them.

Scores are those that its ``--model hf`` computes of an export: a text begins with BOS where the exported tokenizer puts
it there, a text that is longer than the context loses its beginning, and what ends an answer is no part of it.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows

from lifelong_moe.data.tokens.tokenizer import Tokenizer
from lifelong_moe.errors import ConfigError
from lifelong_moe.evaluation.requests import Pass, Request, score
from lifelong_moe.model.next_token import Prompts
from lifelong_moe.model.sampling import sample_steps
from lifelong_moe.model.transformer import LanguageModel

log = logging.getLogger(__name__)

SAMPLING = {"do_sample", "temperature", "top_p"}
"""Keys of a task's ``generation_kwargs`` besides what ends an answer."""
Scored = list[tuple[float, bool]]
"""Log likelihood of each answer in nats, and whether it is what the model would write."""


@dataclass(frozen=True)
class Subject:
    """A model with what belongs to it."""

    model: LanguageModel
    tokenizer: Tokenizer
    ends: Collection[int]
    """Tokens that end an answer, besides BOS, which begins another text."""


@dataclass(frozen=True)
class Reading:
    """How texts are put to a model; names are those of the harness's own models."""

    batch_size: int | None = None
    """Requests a forward pass; None for as many as 8,192 tokens."""
    max_length: int | None = None
    """Tokens of context; None for the model's."""
    add_bos_token: bool | None = None
    """Whether a text begins with BOS; None as others do who read the exported tokenizer."""
    prefix_token_id: int | None = None
    """What precedes a text of which all is scored; None for BOS."""
    label: str | None = None
    """Distribution of the texts, for routing by label."""


class HarnessModel(TemplateLM):
    """Log likelihoods and texts of a model.

    Raises:
        ConfigError: If ``reading.max_length`` is no number of tokens that the model reads.
    """

    def __init__(self, subject: Subject, reading: Reading) -> None:
        super().__init__()
        self.subject, self.reading = subject, reading
        context = subject.model.architecture.model.context
        self.max_length = context if reading.max_length is None else reading.max_length
        if not 2 <= self.max_length <= context:
            raise ConfigError(f"max_length={self.max_length}: must be 2 to {context}, the model's context.")
        given = reading.add_bos_token
        self._adds_bos = subject.tokenizer.adds_bos if given is None else given

    @property
    def eot_token_id(self) -> int:
        """Ends a text: BOS, which begins the next one."""
        return self.subject.tokenizer.bos_id

    @property
    def prefix_token_id(self) -> int:
        """Precedes a text of which all is scored."""
        given = self.reading.prefix_token_id
        return self.eot_token_id if given is None else given

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text, with BOS before it if it is asked for, or, if nothing is, by default."""
        begins = self._adds_bos if add_special_tokens is None else add_special_tokens
        return [self.eot_token_id] * begins + self.subject.tokenizer.encode(string)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> Scored:
        """Score answers after their contexts, ``(context, answer)`` each."""
        found: Scored = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any) -> Scored:
        texts, asked = [], []
        for place, (_, before, answer) in enumerate(requests):
            if not answer:
                raise ConfigError("an answer of a task has no token of its own.")
            # A tokenizer that puts nothing before a text makes no token of an empty one.
            texts.append([*(before or [self.prefix_token_id]), *answer])
            asked.append(Request(place, len(texts[-1]), len(answer)))
        # A text's last token is a target alone.
        _say_cut(sum(len(text) - 1 > self.max_length for text in texts), len(texts))
        found = score(self.subject.model, texts, asked, self._pass())
        return [*zip(found.nats.tolist(), found.is_greedy.tolist(), strict=True)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Score whole texts, in windows that overlap where the last one would be short."""
        texts, asked = [], []
        for place, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            texts.append([self.prefix_token_id, *tokens])
            end = 1
            for _, scored in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                end += len(scored)
                asked.append(Request(place, end, len(scored)))
        found = score(self.subject.model, texts, asked, self._pass())
        nats = [0.0] * len(requests)
        for one, value in zip(asked, found.nats.tolist(), strict=True):
            nats[one.text] += value
        return nats

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Continue contexts, ``(context, generation_kwargs)`` each, until a stop sequence or the end of the text.

        Raises:
            ConfigError: If there is no room for the answer, or a key of ``generation_kwargs`` is not known.
        """
        # Only prompts of one length go together: padding would stand on the left.
        groups: dict[tuple[str, int], list[int]] = defaultdict(list)
        # An empty text of a tokenizer that puts nothing before it has no token.
        prompts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        for place, request in enumerate(requests):
            groups[repr(request.args[1]), len(prompts[place])].append(place)
        texts, seed, cut = [""] * len(requests), 0, 0
        for (_, length), places in sorted(groups.items(), key=lambda group: -group[0][1]):
            answer = _Answer.of(requests[places[0]].args[1])
            rows = self.reading.batch_size or max(1, Pass.tokens // (length + answer.max_tokens))
            cut += len(places) * (length > self.max_length - answer.max_tokens)
            for first in range(0, len(places), rows):
                batch = places[first : first + rows]
                for place, text in zip(batch, self._answers([prompts[i] for i in batch], answer, seed), strict=True):
                    texts[place] = text
                # Equal requests get different texts where they are sampled.
                seed += len(batch)
        _say_cut(cut, len(texts))
        return texts

    def _answers(self, prompts: list[list[int]], answer: _Answer, seed: int) -> list[str]:
        model, tokenizer = self.subject.model, self.subject.tokenizer
        room = self.max_length - answer.max_tokens
        if room < 1:
            raise ConfigError(
                f"max_gen_toks={answer.max_tokens} leaves no room for a question: the context is {self.max_length}."
            )
        bos_id = self.eot_token_id
        # What chooses domains is the whole text after BOS, whether or not the model reads its beginning.
        added = [] if prompts[0][0] == bos_id else [bos_id]
        unread = len(added) + max(0, len(prompts[0]) - room)
        whole = Prompts([[*added, *prompt] for prompt in prompts], self.reading.label, unread)
        ids: list[list[int]] = [[] for _ in prompts]
        going = set(range(len(prompts)))
        for tokens in sample_steps(
            model, whole, answer.max_tokens, temperature=answer.temperature, top_p=answer.top_p, seed=seed
        ):
            going -= {i for i in going if tokens[i] == bos_id or tokens[i] in self.subject.ends}
            for i in [*going]:
                ids[i].append(tokens[i])
                if answer.is_over(tokenizer.decode(ids[i])):
                    going.remove(i)
            if not going:
                break
        return [str(postprocess_generated_text(tokenizer.decode(one), [*answer.until], None)) for one in ids]

    def _pass(self) -> Pass:
        return Pass(self.max_length, self.reading.batch_size, distribution=self.reading.label)


def _say_cut(cut: int, of: int) -> None:
    if cut:
        log.warning("%d of %d texts are longer than the context; they lose their beginning.", cut, of)


@dataclass(frozen=True)
class _Answer:
    """How answers of a task are written."""

    until: tuple[str, ...]
    max_tokens: int
    temperature: float
    top_p: float

    @classmethod
    def of(cls, asked: Any) -> _Answer:
        given: dict[str, Any] = dict(normalize_gen_kwargs(asked))
        until, most = handle_stop_sequences(given.pop("until"), eos=None), given.pop("max_gen_toks")
        if unknown := sorted(set(given) - SAMPLING):
            there = ", ".join(["until", "max_gen_toks", *sorted(SAMPLING)])
            raise ConfigError(f"generation_kwargs.{unknown[0]} is not known; there are {there}.")
        temperature = float(given.get("temperature", 0.0)) if given["do_sample"] else 0.0
        return cls(tuple(one for one in until if one), most, temperature, float(given.get("top_p", 1.0)))

    def is_over(self, text: str) -> bool:
        return any(stop in text for stop in self.until)


def command_line(models: Mapping[str, str]) -> None:
    """Run the harness's own command line on the arguments of this process, with models that it does not have by itself.

    Args:
        models: Places of classes, ``module:name``, by what ``--model`` calls them.
    """
    # Its own models first: it registers them only while there are none.
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    for name, place in models.items():
        if name not in model_registry:
            model_registry.register(name, target=place)
    cli_evaluate()
