"""Arguments and options that several commands share, and groups of options that are passed as one object."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import StrEnum
from typing import Annotated, Any, get_type_hints

import typer

from lifelong_moe.config.names import require_name
from lifelong_moe.errors import ConfigError
from pipelines.shared import completion
from pipelines.shared.output import console

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/quickstart.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as seed=1.")]
ComparisonOverrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="For the comparison, such as seeds=[0], or else for every arm."),
]
RetrainingOverrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="For the file, such as trigger.min_tokens=1, or else for its base."),
]
Replace = Annotated[bool, typer.Option("--replace", help="Let the name of a run refer to other stages than before.")]
ExpertName = Annotated[
    str | None, typer.Option("--expert", metavar="STAGE/L3/E7", help="Show the history of this expert.")
]
DocumentHash = Annotated[
    str | None,
    typer.Option("--document", metavar="HASH", help="Show the experts that saw the document with this SHA-256."),
]


def _named(what: str) -> Callable[[Any], Any]:
    """A check of names on the command line, one or several, or none."""

    def check(given: Any) -> Any:
        for name in given if isinstance(given, (list, tuple)) else [given]:
            if name is not None and what == "RUN" and name.endswith((".yaml", ".yml")):
                raise ConfigError(f"RUN={name}: a run's name and not its file; lifelong-moe runs lists the names.")
            if name is not None:
                require_name(name, what)
        return given

    return check


RunName = Annotated[
    str,
    typer.Argument(metavar="RUN", help="Name of a run.", callback=_named("RUN"), autocompletion=completion.runs),
]
RunNames = Annotated[
    list[str],
    typer.Argument(metavar="RUN...", help="Names of runs.", callback=_named("RUN"), autocompletion=completion.runs),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]
StageName = Annotated[
    str | None,
    typer.Option(
        "--stage",
        help="A committed stage of the run; the last by default.",
        callback=_named("--stage"),
        autocompletion=completion.stages,
    ),
]
Label = Annotated[
    str | None,
    typer.Option("--label", help="Domain of the text, for routing by label.", autocompletion=completion.distributions),
]
Int8 = Annotated[bool, typer.Option("--int8", help="Hold the weight matrices in 8 bits, with one scale per row.")]
OwnRouter = Annotated[
    str | None,
    typer.Option(
        "--router",
        metavar="MODULE.CLASS",
        help="Import this router of your own, which the stage was trained with. It is code: name what you trust.",
    ),
]
GateSettings = Annotated[
    list[str] | None, typer.Argument(metavar="[gate.KEY=VALUE]...", help="Such as gate.tolerance=0.02.")
]


class ExportFormat(StrEnum):
    """What an export is read by: transformers and all that read its checkpoints, or PEFT."""

    hf = "hf"
    peft = "peft"


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the next tokens are sampled."""

    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.", min=1, max=1 << 20)] = 100
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.", min=0.0)] = 0.8
    top_p: Annotated[
        float, typer.Option(help="Sample from the likeliest tokens, up to this mass.", min=0.01, max=1.0)
    ] = 0.95
    seed: Annotated[int, typer.Option(help="Seed of the sampling.", min=0, max=2**63 - 1)] = 0


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """What an evaluation reads: a text, or tasks."""

    data: Annotated[str | None, typer.Option("--data", help="Path or glob of .jsonl, .parquet or text files.")] = None
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            metavar="TASK[,...]",
            help="YAML files of tasks, which are code, or names of tasks that lm-evaluation-harness has; for all "
            "committed stages unless --stage names one.",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class LoadingOptions:
    """How a stage's model is loaded."""

    int8: Int8 = False
    router: OwnRouter = None


@dataclass(frozen=True, kw_only=True)
class TextOutput:
    """How a text is printed."""

    raw: Annotated[bool, typer.Option("--raw", help="Print control characters as they are, not as escapes.")] = False
    as_json: AsJson = False


@dataclass(frozen=True, kw_only=True)
class InspectionRequest:
    """What an inspection reads, and where it writes."""

    text: Annotated[str | None, typer.Option(help="Text whose tokens are coloured by expert.")] = None
    text_file: Annotated[str | None, typer.Option(help="File with such a text.")] = None
    layer: Annotated[int | None, typer.Option(help="Colour by the experts of this layer, not of all.", min=0)] = None
    html: Annotated[str | None, typer.Option(help="Also write the coloured text to this HTML file.")] = None
    save: Annotated[str | None, typer.Option(help="Write every token's experts to this .parquet file.")] = None
    tokens: Annotated[
        int | None, typer.Option(help="Held-out tokens per distribution, 8192 by default; not with a text.", min=1)
    ] = None
    interpolate: Annotated[
        bool,
        typer.Option(
            "--interpolate",
            help="Instead: the losses of five mixtures of the weights that the stage began with and those it learned, "
            "on as many tokens as reports use.",
        ),
    ] = False
    label: Label = None
    force: Annotated[bool, typer.Option("--force", help="Let --html and --save replace files of other origin.")] = False


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What is exported, in which form, and where it is written."""

    to: Annotated[str, typer.Option("--to", metavar="DIR", help="Folder to make.")]
    stage: StageName = None
    generation: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="With bundles: the generation that this stage added.",
            callback=_named("--generation"),
            autocompletion=completion.stages,
        ),
    ] = None
    every: Annotated[
        bool, typer.Option("--all", help="With bundles: a folder for each generation, and how to pick one.")
    ] = False
    format: Annotated[
        ExportFormat, typer.Option(help="Checkpoints, or adapters of the first generation's checkpoint.")
    ] = ExportFormat.hf
    force: Annotated[bool, typer.Option("--force", help="Let an earlier export at DIR be replaced.")] = False


def _explain(asked: bool) -> None:
    if asked:
        from lifelong_moe.reports.verdict import GLOSSARY

        for word, meaning in GLOSSARY.items():
            console().print(f"{word}: {meaning}")
        raise typer.Exit


Glossary = Annotated[
    bool,
    typer.Option(
        "--glossary", help="Only explain the words of the tables and of the verdict.", is_eager=True, callback=_explain
    ),
]


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Show Typer each field of a command's dataclass parameters as an option of its own, in the parameter's place."""
    # Typer reads a signature, not dataclasses, so the wrapper gets one in which the fields stand side by side.
    hints = get_type_hints(command, include_extras=True)
    # Keyword-only, because Click passes all values by name; so the order of defaults does not matter either.
    parameters: list[inspect.Parameter] = []
    groups: dict[str, type] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        if not is_dataclass(hints[name]):
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        options = groups[name] = hints[name]
        types = get_type_hints(options, include_extras=True)
        for field in fields(options):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            parameters.append(
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=types[field.name]
                )
            )

    @functools.wraps(command)
    def expanded(**given: Any) -> None:
        asked = {
            name: options(**{field.name: given.pop(field.name) for field in fields(options)})
            for name, options in groups.items()
        }
        command(**given, **asked)

    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    # Typer also calls get_type_hints, which reads the annotations that `wraps` has copied from the command.
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return expanded
