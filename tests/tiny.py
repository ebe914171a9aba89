"""Tiny corpora and runs for integration and end-to-end tests: in this process, or in a forked child that may die."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import yaml

from lifelong_moe.config.load import read_config
from lifelong_moe.interop.layout.complete import with_checkpoint
from lifelong_moe.store.evaluations import StoredTogether, read_evaluations
from lifelong_moe.store.stages import StageStore
from lifelong_moe.training.callbacks.checkpoint import WRITER
from pipelines.cli import exit_code
from pipelines.run.run import run
from pipelines.shared.output import SafeConsole

STEPS = 12
"""Optimizer steps of a tiny stage."""
EVERY = 4
"""Steps between its checkpoints."""
CONTEXT, SEQUENCES = 32, 4
TOKENS = STEPS * SEQUENCES * CONTEXT

VOCABULARIES = {
    "fruit": "apple pear plum cherry ripe sweet tree orchard basket the a and picks eats",
    "code": "def return self value index for in range import yield lambda x y = == ( ) :",
    "sea": "wave tide salt sail anchor harbour gull reef storm the of under beyond drifts",
}


@contextlib.contextmanager
def working_in(root: Path) -> Iterator[pytest.MonkeyPatch]:
    """Work in a directory with one thread; what a run changes for its process is put back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(root)
            patch.setenv("TOKENIZERS_PARALLELISM", "false")
            yield patch
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)  # Lightning turns it on for the process


def write_corpus(path: Path, words: list[str], seed: int, documents: int = 160) -> None:
    """Write short pseudo-documents, each with a serial number, so that no two are equal."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(documents):
            text = f"{number} " + " ".join(draw.choices(words, k=draw.randint(15, 45)))
            file.write(json.dumps({"text": text}) + "\n")


def write_corpora(root: Path) -> None:
    """``fruit.jsonl``, ``code.jsonl`` and ``sea.jsonl``."""
    for seed, (name, words) in enumerate(VOCABULARIES.items()):
        write_corpus(root / f"{name}.jsonl", words.split(), seed)


def tiny_config(stages: Sequence[str | dict[str, Any]] = ("fruit", "code"), **sections: Any) -> dict[str, Any]:
    """A run of some seconds; ``sections`` are merged one level deep. A stage that is no name learns a mixture."""
    names = dict.fromkeys(name for one in stages for name in ([one] if isinstance(one, str) else one["data"]))
    config: dict[str, Any] = {
        "run": "tiny",
        "tokenizer": {"vocab_size": 300},
        "distributions": {name: {"files": f"{name}.jsonl", "heldout_fraction": 0.1} for name in names},
        "model": {
            "layers": 2, "width": 32, "heads": 2, "kv_heads": 1, "expert_width": 32, "experts": 2, "context": CONTEXT,
        },
        "routing": {"top_k": 1, "renormalize": False},
        "stage_defaults": {
            "tokens": TOKENS,
            "grow": {"experts": 2, "sample_tokens": 512},
            "replay": {"fraction": 0.25},
            "optim": {"lr": 3.0e-3, "batch_tokens": SEQUENCES * CONTEXT},
        },
        "stages": [{"data": one} if isinstance(one, str) else one for one in stages],
        "evaluate": {"tokens": 600},
        "trainer": {"accelerator": "cpu", "log_every_n_steps": 4, "enable_progress_bar": False},
        "checkpoint": {"every_steps": EVERY},
        "tracking": {"enabled": False},
    }  # fmt: skip
    for name, value in sections.items():
        config[name] = {**config.get(name, {}), **value} if isinstance(value, dict) else value
    return config


def write_config(config: dict[str, Any], path: str = "tiny.yaml") -> str:
    """Write a configuration into the current directory; returns its path."""
    Path(path).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def train(path: str = "tiny.yaml", *overrides: str, replace: bool = False) -> tuple[dict[str, Any], str]:
    """Run in this process; returns the report and what was printed."""
    printed = io.StringIO()
    report = run(read_config(path, overrides, with_checkpoint), replace, SafeConsole(printed, width=200))
    return json.loads(json.dumps(report.to_json())), printed.getvalue()


def hashes(root: Path = Path(), run_name: str = "tiny") -> list[str]:
    """SHA-256 of the weights of a run's stages, in order."""
    head = json.loads((root / f"mlruns/runs/{run_name}/head.json").read_text())
    store = StageStore(root / "mlruns")
    return [store.get(key).weights_hash for key in head["stages"]]


def stored_evaluations(pattern: str = "*.json") -> list[dict[str, Any]]:
    """Results under ``mlruns/evaluations/``."""
    read = [read_evaluations(path) for path in Path("mlruns/evaluations").glob(pattern)]
    each = (one.results.values() if isinstance(one, StoredTogether) else [one.result] for one in read)
    return [dict(result) for results in each for result in results]


class Child:
    """A forked process; its output is kept in a file."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid, self.log = pid, log

    def wait(self) -> int:
        """Exit code, or minus the signal's number."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    @property
    def output(self) -> str:
        """What it printed so far."""
        return self.log.read_text(encoding="utf-8")


def fork(action: Callable[[], Any]) -> Child:
    """Do something in a child process, as the command line would: our errors become its exit code."""
    log = Path(f"child-{random.SystemRandom().randrange(1 << 32):08x}.log").absolute()
    pid = os.fork()
    if pid:
        return Child(pid, log)
    _become_child(action, log)


def _become_child(action: Callable[[], Any], log: Path) -> NoReturn:
    code = 99
    # As a terminal starts it: what schedulers and shells without job control start in the background ignores SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1, encoding="utf-8")  # not pytest's
        torch.set_num_threads(1)  # a pool does not survive a fork
        code = exit_code(lambda: print(action()))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait_for_checkpoint(step: int) -> None:
    """Wait until another process has written a stage's checkpoint."""
    began = time.monotonic()
    while not list(Path("mlruns").glob(f"work/*/step-0-{step:08d}")):
        assert time.monotonic() - began < 60, step
        time.sleep(0.01)


def kill_self() -> NoReturn:
    """SIGKILL, as a scheduler or the out-of-memory killer would; a step checkpoint under way is written first.

    So a test knows which one is the newest. What a kill leaves of one under way, test_resume.py asks.
    """
    for thread in threading.enumerate():
        if thread.name == WRITER and thread is not threading.current_thread():
            thread.join()
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")
