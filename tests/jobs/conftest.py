"""The logical devices of tests/train: both folders may run in one process."""

from tests.train.conftest import four_devices

__all__ = ["four_devices"]
