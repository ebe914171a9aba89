"""What can fail in MLflow, and one line about it. MLflow is imported only when asked."""

from __future__ import annotations

from lifelong_moe.redaction import MASK, redact, without_credentials
from lifelong_moe.tracking.connection import sqlite_path
from lifelong_moe.tracking.spool import RefusedError


def failures() -> tuple[type[Exception], ...]:
    """The exceptions by which MLflow, its database, the network or the disk fail or refuse."""
    import sqlite3

    from alembic.util import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    # MLflow opens a database through Alembic, which has its own errors; those of requests are OSErrors.
    return (MlflowException, OSError, SQLAlchemyError, sqlite3.Error, CommandError, RefusedError)


def unusable(uri: str, reason: str) -> str:
    """Why a store could not be opened, with the remedy for a broken SQLite database.

    Args:
        uri: Tracking URI.
        reason: One line.
    """
    path = sqlite_path(uri)
    if path is None or not path.exists():
        return reason
    # The spool holds what the broken database never got, and delivers it to a new one.
    return f"{reason.rstrip('.')}. If this persists, move {path} away: a new database gets the kept records."


def reason_of(error: Exception, uri: str = "") -> str:
    """The first line of an error, without credentials.

    Args:
        error: Of MLflow, a database or the network.
        uri: Tracking URI; MLflow repeats it, password, path and all.
    """
    # Tracebacks and SQL follow in further lines.
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return without_credentials(redact(line, uri), mask=MASK)
