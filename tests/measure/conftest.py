"""Fixtures of the tests of peers."""

from tests.measure.fake_peer import fake

__all__ = ["fake"]
