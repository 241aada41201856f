"""The modules that stand where nn.Linear and nn.Embedding stood: one uint8 buffer `packed` in place of the weight.

They keep the names of what they replace, so that a checkpoint reads like the original's with `weight` become `packed`.
"""

import threading

import torch
from torch import nn

from .linear import linear
from .pack import encode, find_ranges, pack
from .packed import PackedWeight, blob_bytes
from .scheme import Scheme

_LAYING_OUT = threading.Lock()
BIAS = torch.bfloat16  # dtype of a quantised linear's bias


class Packed(nn.Module):
    """Holds a packed weight once: as the buffer `packed`, as it was loaded; from the first call, or packing, on as a
    PackedWeight, whose layout for the kernels then is the buffer `prepared`. A state dict always has `packed`, unless
    the weight is another module's.
    """

    _prepare: bool  # whether kernels multiply with it

    def __init__(self, rows: int, columns: int, scheme: Scheme):
        super().__init__()
        self.scheme = scheme
        self.register_buffer("packed", torch.zeros(blob_bytes(scheme, rows, columns), dtype=torch.uint8))
        self.register_buffer("prepared", None, persistent=False)
        self._weight = None
        self._lender = ()

    def borrow(self, lender: "Packed") -> None:
        """From here on this module's weight is the lender's, as a vocabulary head's is the word embedding's."""
        self.packed = self.prepared = self._weight = None
        self._lender = (lender,)  # within a tuple it is no submodule, whose tensors a state dict would repeat

    @property
    def weight(self) -> PackedWeight:
        """ValueError if the buffer is not a whole packed weight of this module's shape and scheme."""
        if self._weight is None:
            self._lay_out()
        return self._weight

    @torch.compiler.disable  # once, before any call that counts
    def _lay_out(self) -> None:
        lent = self._lender[0].weight.blob if self._lender else None
        with _LAYING_OUT:  # threads may make the first call together
            if self._weight is None:
                self._hold(PackedWeight(self.packed if lent is None else lent, prepare=self._prepare))

    def _hold(self, weight: PackedWeight) -> None:
        if tuple(weight.shape) != self.shape or weight.scheme != self.scheme:
            raise ValueError(f"packed holds {weight}, where {self} was expected")
        self._weight, self.prepared = weight, weight.prepared
        self.packed = weight.blob if weight.prepared is None and not self._lender else None

    def unfold(self) -> None:
        """Back to the buffer alone."""
        if self._weight is not None:
            self.packed = None if self._lender else self._weight.blob
            self.prepared = self._weight = None

    def _apply(self, function, recurse=True):
        self.unfold()
        return super()._apply(function, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is None and not self._lender:
            destination[f"{prefix}packed"] = self._weight.blob

    def _load_from_state_dict(self, *arguments):
        self.unfold()
        super()._load_from_state_dict(*arguments)

    def __getstate__(self):
        packed = self.packed if self._weight is None or self._lender else self._weight.blob
        buffers = {**self._buffers, "packed": packed, "prepared": None}
        return {**self.__dict__, "_buffers": buffers, "_weight": None}


class QuantLinear(Packed):
    """A linear layer on a packed weight [out_features, in_features], for inference.

    A call takes [..., in_features] in float32, bfloat16 or float16 and returns [..., out_features] in the same dtype.
    The bias is kept in bfloat16, the scales' precision. Made empty it waits for a checkpoint.
    """

    _prepare = True

    def __init__(self, in_features: int, out_features: int, scheme: Scheme, *, bias: bool = True):
        super().__init__(out_features, in_features, scheme)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=BIAS), requires_grad=False) if bias else None

    @classmethod
    def like(cls, module: nn.Linear, scheme: Scheme) -> "QuantLinear":
        """Of the module's shape, empty."""
        with module.weight.device:
            return cls(module.in_features, module.out_features, scheme, bias=module.bias is not None)

    @classmethod
    def of(
        cls, module: nn.Linear, scheme: Scheme, importance: torch.Tensor | None = None, lender: Packed | None = None
    ) -> "QuantLinear":
        """The module, packed; `importance` as in `pack`. A lender has packed the same weight before."""
        self = cls.like(module, scheme)
        if lender is None:
            self._hold(pack(module.weight, scheme, importance=importance))
        else:
            self.borrow(lender)
        if module.bias is not None:
            self.bias = nn.Parameter(module.bias.detach().to(BIAS), requires_grad=False)
        return self

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.scheme}"


class QuantEmbedding(Packed):
    """An embedding table packed row by row: a look-up unpacks the rows that it reads and no others.

    Takes integer ids of any shape and returns [..., embedding_dim] in the model's dtype.
    """

    _prepare = False

    def __init__(self, num_embeddings: int, embedding_dim: int, scheme: Scheme, *, padding_idx: int | None = None):
        super().__init__(num_embeddings, embedding_dim, scheme)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        # Of the dtype of what is looked up: it follows the model's, as a weight would.
        self.register_buffer("like_output", torch.empty(0), persistent=False)

    @classmethod
    def like(cls, module: nn.Embedding, scheme: Scheme) -> "QuantEmbedding":
        """Of the module's shape, empty."""
        with module.weight.device:
            self = cls(module.num_embeddings, module.embedding_dim, scheme, padding_idx=module.padding_idx)
        self.like_output = self.like_output.to(module.weight.dtype)
        return self

    @classmethod
    def of(cls, module: nn.Embedding, scheme: Scheme, lender: Packed | None = None) -> "QuantEmbedding":
        """The module, packed. A lender has packed the same weight before."""
        self = cls.like(module, scheme)
        if lender is None:
            self.packed = encode(module.weight, scheme, *find_ranges(module.weight, scheme), prepare=False).blob
        else:
            self.borrow(lender)
        return self

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weight.rows(ids).to(self.like_output.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.scheme}"
