"""The version, in one place: setup.py, checkpoints, manifests and the CHANGELOG agree on it."""

__version__ = "0.1.0"
