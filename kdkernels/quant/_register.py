"""Makes the method "kdkernels" known to transformers when its quantisers are imported, and not before.

`import kdkernels` is all that AutoModel.from_pretrained needs; importing transformers' quantisers right away would more
than double the time that it takes.
"""

import importlib
import importlib.abc
import importlib.util
import sys

_HOST = "transformers.quantizers.auto"


class _Loader(importlib.abc.Loader):
    """Runs the module, then ours."""

    def __init__(self, loader):
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        importlib.import_module(f"{__package__}.integration")


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != _HOST:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        spec.loader = _Loader(spec.loader)
        return spec


def register() -> None:
    if _HOST in sys.modules:
        importlib.import_module(f"{__package__}.integration")
    elif importlib.util.find_spec("transformers") is not None:
        sys.meta_path.insert(0, _Finder())
