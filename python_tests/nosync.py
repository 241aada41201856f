"""A dispatch mode that fails where the host would have to wait for a GPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WAITS = {
    *(aten._local_scalar_dense, aten.is_nonzero, aten.equal),
    *(aten.nonzero, aten.masked_select, aten.unique_dim, aten._unique2, aten.unique_consecutive),
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class NoSync(TorchDispatchMode):
    """Fails on an operator whose result the host has to wait for: a value read, or a shape that depends on values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = function.overloadpacket in WAITS
        if function.overloadpacket in INDEXING:  # a bool index is turned into positions first
            waits = any(index is not None and index.dtype == torch.bool for index in args[1])
        assert not waits, f"{function} makes the host wait"
        return function(*args, **(kwargs or {}))
