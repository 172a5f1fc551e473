from __future__ import annotations

from tests.pretend_cuda import pool


def pytest_sessionfinish():
    pool.close_all()
