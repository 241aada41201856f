"""How a weight is quantised: `Scheme`, and the schemes that have a name."""

from dataclasses import dataclass

BITS = (8, 4, 3, 2)
GROUPS = ("channel", "out", "in", "block")
RUN = 32  # columns whose codes lie together; blocks are multiples of it
DEFAULT_GROUP_SIZE = 32
LARGEST_GROUP = {"out": 1 << 20, "in": 1 << 15, "block": 1 << 15}  # at least all of a weight


@dataclass(frozen=True)
class Scheme:
    """What shares a scale, and how many bits a weight has.

    Args:
        bits: 8, 4, 3 or 2 bits a weight.
        group: what shares a scale (and a zero): "channel" = one output feature; "out" = `group_size` consecutive output
            features (Q-BERT, arXiv 1909.05840); "in" = `group_size` consecutive input features of all outputs (what
            Q-BERT's released code does); "block" = `group_size` consecutive input features of one output.
        group_size: for "out", "in" and "block"; 32 where None. A multiple of 32 for "block"; None for "channel".
        symmetric: zero is the middle code; otherwise each group has its own zero, an integer code.
        activation_bits: 8 = activations are quantised too, each row (token) by its own largest magnitude, and products
            are integers; None = weight-only: activations stay as they are, and products are float32.

    Raises ValueError or TypeError naming the field.
    """

    bits: int = 8
    group: str = "channel"
    group_size: int | None = None
    symmetric: bool = True
    activation_bits: int | None = 8

    def __post_init__(self):
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or self.bits not in BITS:
            raise ValueError(f"bits must be one of 8, 4, 3, 2, got {self.bits!r}")
        if self.group not in GROUPS:
            raise ValueError(f"group must be one of {', '.join(map(repr, GROUPS))}, got {self.group!r}")
        if not isinstance(self.symmetric, bool):
            raise TypeError(f"symmetric must be a bool, got {type(self.symmetric).__name__}")
        if self.activation_bits is not None and (
            not isinstance(self.activation_bits, int) or self.activation_bits != 8
        ):
            raise ValueError(
                f"activation_bits must be 8, or None for weight-only quantisation; got {self.activation_bits!r}"
            )
        self._check_group_size()

    def _check_group_size(self) -> None:
        size = self.group_size
        if self.group == "channel":
            if size is not None:
                raise ValueError(f"group_size must be None with group 'channel', got {size!r}")
            return
        if size is None:
            object.__setattr__(self, "group_size", DEFAULT_GROUP_SIZE)
            return
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"group_size must be an int or None, got {type(size).__name__}")
        most = LARGEST_GROUP[self.group]
        if not 1 <= size <= most or (self.group == "block" and size % RUN):
            accepted = "a positive multiple of 32" if self.group == "block" else ">= 1"
            raise ValueError(f"group_size must be {accepted} and at most {most} with group {self.group!r}, got {size}")

    @property
    def two_level(self) -> bool:
        """Whether a block's scale is its row's scale times an integer step; see csrc/core/packed.h."""
        return self.group == "block" and self.bits < 8


NAMED = {
    "int8": Scheme(),
    "int4": Scheme(bits=4, group="block", symmetric=False),
    "int3": Scheme(bits=3, group="block", symmetric=False),
    "int2": Scheme(bits=2, group="block", symmetric=False),
}


def as_scheme(value, argument: str = "scheme") -> Scheme:
    """A Scheme as it is, or the one of that name. ValueError naming the argument."""
    if isinstance(value, Scheme):
        return value
    if isinstance(value, str) and value in NAMED:
        return NAMED[value]
    names = ", ".join(map(repr, NAMED))
    raise ValueError(f"{argument} must be a Scheme or one of {names}, got {value!r}")
