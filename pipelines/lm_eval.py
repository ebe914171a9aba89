"""``python -m pipelines.lm_eval``: the command line of lm-evaluation-harness, with ``--model lifelong-moe``.

Versions that look for models of installed packages (entry points ``lm_eval.models``; 0.4.13 does not) find ours by
themselves, and ``lm_eval`` does as well.
"""

from __future__ import annotations

from importlib.util import find_spec

from lifelong_moe.errors import ConfigError
from pipelines.cli import run

MODEL = "pipelines.inspect.harness:LifelongModel"


def command_line() -> None:
    """Run the harness's own command line.

    Raises:
        ConfigError: If it is not installed, or a model or task of ours cannot be used.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError("lm-evaluation-harness is not installed: pip install 'lifelong-moe[lm-eval]'.")
    from lifelong_moe.evaluation import harness

    harness.command_line({"lifelong-moe": MODEL})


if __name__ == "__main__":
    run(command_line)
