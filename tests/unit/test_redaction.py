"""URLs lose user, password and query, wherever they stand."""

from __future__ import annotations

import pytest

from lifelong_moe.redaction import without_credentials


@pytest.mark.parametrize(
    ("url", "shown", "masked"),
    [
        ("https://host:5000/x", "https://host:5000/x", "https://host:5000/x"),
        ("https://user:p%40ss@host:5000/x", "https://host:5000/x", "https://***@host:5000/x"),
        ("http://me:canary@host/base?token=canary", "http://host/base", "http://***@host/base?***"),
        ("postgresql://me:ca#na?r@y@host:1/db", "postgresql://host:1/db", "postgresql://***@host:1/db"),
        ("sqlite:////data/me@work/mlflow.db", "sqlite:////data/me@work/mlflow.db", "sqlite:////data/me@work/mlflow.db"),
        ("no URL? me@home", "no URL? me@home", "no URL? me@home"),
        (
            "a http://u:p@h?q=1 b s3://u@h/x: why?",
            "a http://h b s3://h/x: why?",
            "a http://***@h?*** b s3://***@h/x: why?",
        ),
    ],
)
def test_credentials_are_not_shown(url: str, shown: str, masked: str) -> None:
    assert without_credentials(url) == shown
    assert without_credentials(url, mask="***") == masked
