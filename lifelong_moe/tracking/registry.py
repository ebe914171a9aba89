"""Committed stages as versions in MLflow's model registry, each a model that MLflow loads."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lifelong_moe.store.pointer import point_to
from lifelong_moe.store.stages import CommittedStage, StageStore
from lifelong_moe.tracking.model_files import DATA, how_to_load, model_files
from lifelong_moe.tracking.values import DESCRIPTION_CHARACTERS, clean_key, cut

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

STAGE_KEY_TAG = "stage_key"
DIRECTORY_TAG = "directory"
MODELS = "models"
"""Folder of a run's artifacts in which its models are."""


PENDING = "at the gate"
"""Description of a version without a verdict; the only one that a later registration replaces."""


@dataclass(frozen=True)
class Version:
    """A model version to register."""

    name: str
    """Registered model."""
    store: StageStore
    """Has the stage."""
    stage: CommittedStage
    run_id: str
    """Run that trained it."""
    tags: dict[str, str]
    """Must have ``stage_key``."""
    description: str
    """Markdown."""
    alias: str | None
    """Moved to this version, if given."""

    @property
    def path(self) -> str:
        """Of its folder, below the run's artifacts."""
        return f"{MODELS}/{self.stage.path.name}"


def registered_name(name: str) -> str:
    """A model's name without characters that MLflow refuses there, or that would end a filter."""
    return re.sub("[/:']", "-", name)


def register_version(client: MlflowClient, artifacts: ArtifactRepository, version: Version, *, remote: bool) -> str:
    """Register a stage once, with a folder among its run's artifacts that MLflow loads.

    Where MLflow keeps its artifacts in this store, the folder refers to the stages of the store; elsewhere it holds a
    copy of all that the stage needs.

    Args:
        client: MLflow client.
        artifacts: Of the run that trained it.
        version: What to register.
        remote: Whether artifacts go to a server.

    Returns:
        The number of the new version, or of the one with the same stage key that exists already.
    """
    name = registered_name(version.name)
    # Looked up by stage key first, so that a repeated delivery registers nothing twice.
    found = _find(client, name, version)
    if found is None:
        number = _create(client, artifacts, name, version, remote=remote)
    else:
        number = str(found.version)
        if version.description and str(found.description or "").startswith(PENDING):
            _describe(client, name, number, version)
    if version.alias:
        client.set_registered_model_alias(name, version.alias, number)
    return number


def remove_alias(client: MlflowClient, name: str, alias: str, key: str) -> None:
    """Remove a model's alias if it is on the version of a stage; one that has moved on stays.

    Args:
        client: MLflow client.
        name: Registered model.
        alias: Such as ``candidate``.
        key: Of the stage.
    """
    from mlflow.exceptions import MlflowException

    name = registered_name(name)
    try:
        number = client.get_registered_model(name).aliases.get(alias)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return
    if number is not None and client.get_model_version(name, number).tags.get(STAGE_KEY_TAG) == key:
        client.delete_registered_model_alias(name, alias)


def _find(client: MlflowClient, name: str, version: Version) -> ModelVersion | None:
    key = version.tags[STAGE_KEY_TAG]
    found = client.search_model_versions(f"name = '{name}' and tags.{STAGE_KEY_TAG} = '{key}'")
    # Those of earlier releases pointed at the stage itself, which MLflow cannot load.
    ours = [one for one in found if str(one.source).endswith(f"/{version.path}")]
    return min(ours, key=lambda one: int(one.version), default=None)


def _create(client: MlflowClient, artifacts: ArtifactRepository, name: str, version: Version, *, remote: bool) -> str:
    from mlflow.exceptions import MlflowException

    source = _write(artifacts, version, remote=remote)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {clean_key(key): str(value) for key, value in version.tags.items()}
    created = client.create_model_version(
        name,
        source,
        run_id=version.run_id,
        tags=tags | {DIRECTORY_TAG: str(version.stage.path.absolute())},
        await_creation_for=0,  # everything is there, so there is nothing to wait for
    )
    # Its number is known only now.
    number = str(created.version)
    _describe(client, name, number, version)
    return number


def _describe(client: MlflowClient, name: str, number: str, version: Version) -> None:
    how = how_to_load(name, number)
    # First what the version is, of which MLflow's list of versions shows the beginning.
    note = cut(version.description, DESCRIPTION_CHARACTERS - len(how) - 2)
    client.update_model_version(name, number, f"{note}\n\n{how}".strip())


def _write(artifacts: ArtifactRepository, version: Version, *, remote: bool) -> str:
    """Write the model's folder; returns its address."""
    store, run_id = version.store, version.run_id
    pointer = point_to(store, version.stage.key, None if remote else store.root.parent)
    if remote:
        for key in pointer.manifests:
            path = store.get(key).path
            artifacts.log_artifacts(str(path), f"{version.path}/{DATA}/stages/{path.name}")
            if store.signed_by(key) is not None:
                artifacts.log_artifact(str(store.signature(key)), f"{version.path}/{DATA}/signatures")
    for file, text in model_files(pointer, run_id, version.path).items():
        write_artifact(artifacts, f"{version.path}/{file}", text.encode())
    # A local path is loaded where it is; the other form would be copied first, away from the store.
    place = f"runs:/{run_id}" if remote else artifacts.artifact_uri
    return f"{place}/{version.path}"


def write_artifact(artifacts: ArtifactRepository, path: str, content: bytes) -> None:
    """Put a file at a path below a run's artifacts."""
    folder, _, name = path.rpartition("/")
    # Only files are taken, and the artifact is named like the file.
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary, name)
        file.write_bytes(content)
        artifacts.log_artifact(str(file), folder or None)
