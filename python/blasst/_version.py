"""The version of the build."""

__version__ = "0.1.0"
