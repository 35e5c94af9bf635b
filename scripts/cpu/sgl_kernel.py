"""Stands in for SGLang's compiled kernels, which have no CPU wheel.

SGLang imports names from here at start but calls none of them with the torch-native backends.
Copied to site-packages by `install.py` on machines without a GPU.
"""

__version__ = "0.0.0"


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} needs a GPU")

    absent.__name__ = name
    return absent
