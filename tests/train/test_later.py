"""What Keras imports and training does not use is imported by who uses it, and only then."""

from __future__ import annotations

import subprocess
import sys

import pytest

COUNT = """
import sys
{first}
import tensorflow as tf, keras
assert tf.keras.Model is keras.Model
extras = [name for name in ("sklearn", "matplotlib") if name in sys.modules]
import inspect
inspect.getmodule(keras.Model)  # looks at every module's file
assert extras == [name for name in ("sklearn", "matplotlib") if name in sys.modules]
print(*extras)
{then}
"""


def run(first: str, then: str = "") -> str:
    code = COUNT.format(first=first, then=then)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


PUT_OFF = "from orchestrator.train.later import put_off; put_off()"


def test_neither_of_them_is_imported_before_it_is_used() -> None:
    # Without this there would be nothing to put off.
    assert run("") == "sklearn matplotlib"
    assert run(PUT_OFF) == ""


FIND = """
{first}
import sklearn.base
assert found.__module__.startswith("keras.src")
assert issubclass(found, sklearn.base.BaseEstimator)
{second}
assert callable(found) and found.__module__.startswith("keras.src")
assert sys.modules[found.__module__].plt is sys.modules["matplotlib.pyplot"]
"""
USES = [
    (
        "found = keras.wrappers.SKLearnClassifier",
        "from keras.visualization import plot_image_gallery as found",
    ),
]
OTHER_USES = [
    (
        "from keras.wrappers import SKLearnClassifier as found",
        "found = tf.keras.visualization.plot_image_gallery",
    ),
    (
        "import keras.wrappers; found = keras.wrappers.SKLearnClassifier",
        "found = keras.visualization.plot_image_gallery",
    ),
    (
        "from keras.src.wrappers.sklearn_wrapper import SKLearnClassifier as found",
        "from keras.src.visualization.plot_image_gallery import plot_image_gallery as found",
    ),
]


@pytest.mark.parametrize(
    ("first", "second"),
    [*USES, *(pytest.param(*uses, marks=pytest.mark.thorough) for uses in OTHER_USES)],
)
def test_whoever_uses_them_finds_them(first: str, second: str) -> None:
    assert run(PUT_OFF, FIND.format(first=first, second=second)) == ""
