"""The logical devices of tests/train: all these folders may run in one process."""

from tests.train.conftest import four_devices

__all__ = ["four_devices"]
