"""Committed stages as versions in MLflow's model registry."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lifelong_moe.redaction import is_web
from lifelong_moe.tracking.values import clean_key

if TYPE_CHECKING:
    from mlflow import MlflowClient

STAGE_KEY_TAG = "stage_key"
DIRECTORY_TAG = "directory"


@dataclass(frozen=True)
class Version:
    """A model version to register."""

    name: str
    """Registered model."""
    directory: Path
    """Absolute path of the stage."""
    run_id: str
    """Run that trained it."""
    tags: dict[str, str]
    """Must have ``stage_key``."""
    description: str
    """Markdown."""
    alias: str | None
    """Moved to this version, if given."""


def register_version(client: MlflowClient, uri: str, version: Version) -> str:
    """Register a stage once.

    Args:
        client: MLflow client.
        uri: Its tracking URI.
        version: What to register.

    Returns:
        The number of the new version, or of the one with the same stage key that exists already.
    """
    name = re.sub("[/:']", "-", version.name)
    # Looked up by stage key first, so that a repeated delivery registers nothing twice.
    number = _find(client, name, version.tags[STAGE_KEY_TAG]) or _create(client, uri, name, version)
    if version.alias:
        client.set_registered_model_alias(name, version.alias, number)
    return number


def _find(client: MlflowClient, name: str, stage_key: str) -> str | None:
    found = client.search_model_versions(f"name = '{name}' and tags.{STAGE_KEY_TAG} = '{stage_key}'")
    return str(min(int(version.version) for version in found)) if found else None


def _create(client: MlflowClient, uri: str, name: str, version: Version) -> str:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = str(version.directory)
    if is_web(uri):
        # A server refuses local paths outside of the run's artifacts: leave a pointer there.
        pointer = f"stages/{version.tags[STAGE_KEY_TAG]}"
        client.log_text(version.run_id, f"{version.directory}\n", f"{pointer}/directory.txt")
        source = f"runs:/{version.run_id}/{pointer}"
    tags = {clean_key(key): str(value) for key, value in version.tags.items()}
    created = client.create_model_version(
        name,
        source,
        run_id=version.run_id,
        tags=tags | {DIRECTORY_TAG: str(version.directory)},
        description=version.description,
        await_creation_for=0,  # nothing is copied, so there is nothing to wait for
    )
    return str(created.version)
