"""Masking: what is a secret is shown nowhere, what is none stays readable."""

from __future__ import annotations

import pytest

from orchestrator.spec.secrets import (
    MASK,
    is_literal_secret,
    is_secret_key,
    mask_overrides,
    mask_text,
    masked,
)


@pytest.mark.parametrize(
    "key",
    [
        "password",
        "db_passwd",
        "client_secret",
        "SECRET",
        "token",
        "hf_token",
        "api_key",
        "apikey",
        "API_KEY",
        "access_key",
        "private_key",
        "credentials",
        "job.args.api_key",
    ],
)
def test_a_key_that_looks_like_a_secret_is_one(key: str) -> None:
    assert is_secret_key(key)


@pytest.mark.parametrize(
    "key", ["train.seed", "job.name", "key", "tokenizer", "token_count", "max_tokens", "monkey"]
)
def test_an_ordinary_key_is_no_secret(key: str) -> None:
    assert not is_secret_key(key)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:hunter2@host/path", "https://***@host/path"),
        ("http://hunter2@host:5000", "http://***@host:5000"),
        ("postgresql+psycopg2://me:hunter2@host/db", "postgresql+psycopg2://***@host/db"),
        ("at https://a:hunter2@b and ftp://c:hunter2@d", "at https://***@b and ftp://***@d"),
    ],
)
def test_credentials_inside_an_address_are_masked(text: str, shown: str) -> None:
    assert mask_text(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "http://host:5000/path",
        "sqlite:////home/me/runs/mlflow.db",
        "me@host.example",
        "http://host/users/me@example",
        "data at /mnt/a:b@c",
    ],
)
def test_a_text_without_credentials_stays_as_it_is(text: str) -> None:
    assert mask_text(text) == text


def test_secrets_are_found_in_nested_values() -> None:
    values = {
        "job": {"name": "a", "args": {"api_key": "hunter2", "urls": ["http://me:hunter2@host"]}},
        "token": ["hunter2", "hunter2"],
    }
    assert masked(values) == {
        "job": {"name": "a", "args": {"api_key": MASK, "urls": ["http://***@host"]}},
        "token": [MASK, MASK],
    }


@pytest.mark.parametrize("value", [1, 1.5, None, True, "", "text", [1, "a"], {}])
def test_what_is_no_secret_keeps_its_type_and_value(value: object) -> None:
    shown = masked({"width": value})["width"]
    assert shown == value and type(shown) is type(value)


@pytest.mark.parametrize(
    ("key", "value", "is_written_out"),
    [
        ("tracking.uri", "http://me:hunter2@${oc.env:HOST}:5000", True),
        ("tracking.uri", "http://me:${oc.env:PW,${oc.env:OTHER}}@host", False),
        ("tracking.uri", "http://${oc.env:HOST}:5000", False),
        ("job.args.token", "Bearer ${oc.env:TOKEN}", False),
        ("job.args.token", "Bearer hunter2", True),
    ],
)
def test_a_reference_hides_no_secret_beside_it(key: str, value: str, is_written_out: bool) -> None:
    assert is_literal_secret(key, value) is is_written_out


def test_masking_leaves_the_original_alone() -> None:
    values = {"args": {"api_key": "hunter2"}}
    masked(values)
    assert values == {"args": {"api_key": "hunter2"}}


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("job.args.api_key=hunter2", "job.args.api_key=***"),
        ("++job.args.api_key=hunter2=", "++job.args.api_key=***"),
        ("tracking.uri=https://me:hunter2@host", "tracking.uri=https://***@host"),
        ("train.seed=3", "train.seed=3"),
        ("job.args.name=a=b", "job.args.name=a=b"),
        ("~job.args.api_key", "~job.args.api_key"),
        ("job.args.api_key=${oc.env:KEY}", "job.args.api_key=${oc.env:KEY}"),
        ("tracking.uri=http://me:${oc.env:PW}@host", "tracking.uri=http://me:${oc.env:PW}@host"),
        (
            "tracking.uri=http://me:hunter2@${oc.env:HOST}:5000",
            "tracking.uri=http://***@${oc.env:HOST}:5000",
        ),
    ],
)
def test_an_override_is_shown_with_its_secret_masked(override: str, shown: str) -> None:
    assert mask_overrides([override]) == [shown]
