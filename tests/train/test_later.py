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


USES = (
    "found = keras.wrappers.SKLearnClassifier",
    "from keras.visualization import plot_image_gallery as found",
)
OTHER_USES = (
    "from keras.wrappers import SKLearnClassifier as found",
    "import keras.wrappers; found = keras.wrappers.SKLearnClassifier",
    "found = tf.keras.visualization.plot_image_gallery",
    "from keras.src.wrappers.sklearn_wrapper import SKLearnClassifier as found",
)


@pytest.mark.parametrize(
    "use",
    [*USES, *(pytest.param(use, marks=pytest.mark.thorough) for use in OTHER_USES)],
)
def test_whoever_uses_them_finds_them(use: str) -> None:
    then = f"{use}\nassert callable(found) and found.__module__.startswith('keras.src')"
    checks = """
if "SK" in found.__name__:
    import sklearn.base
    assert issubclass(found, sklearn.base.BaseEstimator)
else:
    assert sys.modules[found.__module__].plt is sys.modules["matplotlib.pyplot"]
"""
    run(PUT_OFF, then + checks)
