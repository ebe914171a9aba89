"""What MLflow reads of a registered version: a folder with an ``MLmodel``, which it loads, serves and deploys.

The code that it names is this package as it is installed, never a file of the folder, and there is no pickle in it.
"""

from __future__ import annotations

import dataclasses
import platform
from importlib.metadata import version

import yaml

from lifelong_moe.storage.keys import canonical_json
from lifelong_moe.store.pointer import POINTER, StagePointer

LOADER = "lifelong_moe.serving.pyfunc"
"""Module whose ``_load_pyfunc`` MLflow calls."""
DATA = "data"
"""Folder, within the model's, that the loader is given."""
REQUIREMENTS, CONDA, PYTHON = "requirements.txt", "conda.yaml", "python_env.yaml"
PARAMS: tuple[tuple[str, str, object], ...] = (
    ("output", "string", "text"),
    ("max_new_tokens", "long", 100),
    ("temperature", "double", 0.8),
    ("top_p", "double", 0.95),
    ("seed", "long", 0),
    ("label", "string", None),
)
"""What ``predict`` may be told besides the texts, with MLflow's type and the default."""


def model_files(pointer: StagePointer, run_id: str, path: str) -> dict[str, str]:
    """The text files of a model's folder, by path within it.

    Args:
        pointer: The stage.
        run_id: MLflow run that has the folder among its artifacts.
        path: Where the folder is there.
    """
    packages = [f"mlflow=={version('mlflow')}", f"lifelong-moe=={version('lifelong-moe')}"]
    python = platform.python_version()
    dependencies = [f"python={python}", "pip", {"pip": packages}]
    return {
        f"{DATA}/{POINTER}": canonical_json(dataclasses.asdict(pointer)),
        REQUIREMENTS: "".join(f"{package}\n" for package in packages),
        # Names of packages alone: which index has them, and how it is reached, is for whoever installs them to say.
        CONDA: yaml.safe_dump({"name": "lifelong-moe", "channels": ["conda-forge"], "dependencies": dependencies}),
        PYTHON: yaml.safe_dump(
            {"python": python, "build_dependencies": ["pip"], "dependencies": [f"-r {REQUIREMENTS}"]}
        ),
        # Last: a folder without it is none of a model's.
        "MLmodel": _mlmodel(run_id, path),
    }


def how_to_load(name: str, number: str) -> str:
    """Markdown for a version's page.

    Args:
        name: Of the registered model.
        number: Of the version.
    """
    uri = f"models:/{name}/{number}"
    return (
        f"**Load**, with `MLFLOW_TRACKING_URI` set to where this page is from:\n\n"
        f'```python\nmodel = mlflow.pyfunc.load_model("{uri}")\n'
        f'model.predict(["A text"])                                     # its continuation\n'
        f'model.predict(["A text"], params={{"output": "loss"}})          # nats per token, bits per byte\n```\n\n'
        f'**Serve**: `mlflow models serve -m "{uri}" --env-manager local`'
    )


def _mlmodel(run_id: str, path: str) -> str:
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import AnyType, ColSpec, ParamSchema, ParamSpec, Schema

    signature = ModelSignature(
        inputs=Schema([ColSpec("string")]),
        # A text, or an object of numbers: `output` decides.
        outputs=Schema([ColSpec(AnyType())]),
        params=ParamSchema([ParamSpec(name, kind, default) for name, kind, default in PARAMS]),
    )
    model = Model(artifact_path=path, run_id=run_id, signature=signature)
    env, python = {"conda": CONDA, "virtualenv": PYTHON}, platform.python_version()
    # As `mlflow.pyfunc.add_to_model` does, whose import takes long and warns.
    model.add_flavor("python_function", loader_module=LOADER, python_version=python, data=DATA, env=env)
    return str(model.to_yaml())
