"""A bucket that conversions go to."""

import pytest
from support.servers import s3_server, use_s3


@pytest.fixture(scope="module")
def s3():
    with s3_server() as server:
        yield server


@pytest.fixture
def bucket(s3, monkeypatch):
    use_s3(monkeypatch, s3.url)
    return s3
