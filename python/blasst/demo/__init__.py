"""The demo: a small model is calibrated, then reads long texts densely and sparsely."""

from blasst.demo.run import demo

__all__ = ["demo"]
