from __future__ import annotations

import pytest
import sqlalchemy

from rankadaptor_optuna.database.connections import check_url, error_line, masked


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql+psycopg://me:s3cret@host:5432/db", "postgresql+psycopg://me:***@host:5432/db"),
        ("postgresql://me:s3:cret@[::1]:5432/db", "postgresql://me:***@[::1]:5432/db"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        (
            "postgresql://host/db?user=me&password=s3cret&sslmode=require",
            "postgresql://host/db?user=me&password=***&sslmode=require",
        ),
        ("postgresql://host:5432/db?password=s3@cret", "postgresql://host:5432/db?password=***"),
        ("mysql+pymysql://host/db?passwd=s3cret", "mysql+pymysql://host/db?passwd=***"),
        ("mssql+pyodbc://?odbc_connect=DRIVER;PWD=s3cret", "mssql+pyodbc://?odbc_connect=***"),
        ("postgresql://me:s3@cret@host/db", "postgresql://***"),
        ("postgresql://me:s3@cr/et@host/db", "postgresql://***"),
        ("postgresql://me:s3/cret@host/db", "postgresql://***"),
        ("postgresql://me:s3?cret@host/db", "postgresql://***"),
        ("postgresql://me:123?s3cret@host/db", "postgresql://***"),
        ("postgresql://me:s3#cret@host/db", "postgresql://***"),
        ("sqlite:///study.db", "sqlite:///study.db"),
        ("sqlite:////me:you@home/study.db?timeout=5", "sqlite:////me:you@home/study.db?timeout=5"),
        ("sqlite+pysqlcipher://:s3cret@/study.db", "sqlite+pysqlcipher://:***@/study.db"),
        ("sqlite://", "sqlite://"),
        ("s3cret", "(not a database URL)"),
        ("host=h password=s3cret", "(not a database URL)"),
        (
            sqlalchemy.make_url("postgresql://me:s3%40cret@host/db?password=s3cret"),
            "postgresql://me:***@host/db?password=***",
        ),
    ],
)
def test_a_masked_url_keeps_all_but_the_passwords(url, shown):
    assert masked(url) == shown


@pytest.mark.parametrize("url", ["postgresql://me:s3%40cret@host/db", "postgresql://host/db?password=s3@cret"])
def test_a_drivers_message_loses_the_passwords(url):
    check_url(url)
    assert error_line(ValueError("no host 's3@cret'\nof host"), url) == "no host '***'"


@pytest.mark.parametrize(
    "url", ["postgresql://me:s3@cret@host/db", "postgresql://m:s3@c/ret@host/db", "mysql://a:s3@c?ret@h"]
)
def test_a_url_whose_password_has_a_bare_at_sign_is_refused(url):
    with pytest.raises(ValueError, match="an @ that must be written as %40"):
        check_url(url)
