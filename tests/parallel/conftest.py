"""Rows of the data tests, for processes that share them."""

from tests.data.conftest import broken_rows, config

__all__ = ["broken_rows", "config"]
