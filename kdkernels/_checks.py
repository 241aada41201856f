"""What is legal, said once: every public loss calls these, and nothing behind them checks semantics again.

Each check raises ValueError (or TypeError for a wrong kind of object) naming the argument, what was given and what is
accepted. Values that live on a GPU are not read (that would be a host sync): there a bad row temperature or label gives
NaN for its row.
"""

import itertools
import math

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(name: str, value, dims: int | None = None) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    if dims is not None and value.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions, got shape {list(value.shape)}")
    return value


def teacher(name: str, value: torch.Tensor) -> None:
    if value.requires_grad:
        raise ValueError(
            f"{name} requires grad, but gradients flow to the student's arguments only; run the teacher under "
            "torch.no_grad() or pass a detached tensor"
        )


def same_device(first_name: str, first: torch.Tensor, **others) -> None:
    for name, value in others.items():
        if value is not None and value.device != first.device:
            raise ValueError(f"{name} is on {value.device}, but {first_name} is on {first.device}; both must match")


def choice(name: str, value, accepted):
    """The integer that stands for `value` in the table `accepted`."""
    try:
        return accepted[value]
    except (KeyError, TypeError):
        options = ", ".join(repr(key) for key in accepted)
        raise ValueError(f"{name} must be one of {options}, got {value!r}") from None


def truth(name: str, value) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
    return value


def number(name: str, value, *, low: float = -math.inf, high: float = math.inf, above: float | None = None) -> float:
    """A finite real number within [low, high], and above `above`."""
    wrong = f"{name} must be a number, got {type(value).__name__}"
    if isinstance(value, (bool, str)):
        raise TypeError(wrong)
    if not isinstance(value, (int, float)):
        try:
            value = float(value)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(wrong) from None
    # Comparisons, which are false for NaN, and no math.isfinite: torch.compile traces them for a symbolic number too.
    if not (-math.inf < value < math.inf and low <= value <= high) or (above is not None and value <= above):
        accepted = f"> {above}" if above is not None else f"in [{low}, {high}]" if high < math.inf else "finite"
        raise ValueError(f"{name} must be a finite number {accepted}, got {value}".replace("number finite", "number"))
    return float(value)


def readable(value: torch.Tensor) -> bool:
    """Whether looking at the values costs nothing: a real CPU tensor, outside of tracing and torch.func."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return value.device.type == "cpu" and type(value) is torch.Tensor


def mask(value, shape: tuple, like: torch.Tensor, described: str) -> torch.Tensor | None:
    """`value` as a contiguous bool tensor of `shape`, or None."""
    if value is None:
        return None
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"mask must be a tensor or None, got {type(value).__name__}")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"mask must have the shape {list(shape)} ({described}), got {list(value.shape)}")
    same_device("the student", like, mask=value)
    if value.dtype == torch.bool:
        return value.contiguous()
    if readable(value) and not bool(((value == 0) | (value == 1)).all()):
        raise ValueError(
            "mask must be bool or hold only 0 (padding) and 1 (real token), as transformers' attention_mask; got other "
            "values (an additive mask?)"
        )
    return (value != 0).contiguous()


def sequences(cu_seqlens, max_seqlen, given_mask, like: torch.Tensor) -> int:
    """The bound of a packed sequence's length, from the arguments that come with packed tokens `like` [tokens, ...]."""
    if cu_seqlens is None:
        if max_seqlen is not None:
            raise ValueError("max_seqlen needs cu_seqlens: it bounds the length of packed sequences")
        return 0
    if given_mask is not None:
        raise ValueError("mask must be None where cu_seqlens is given: packed sequences hold no padding")
    if not isinstance(cu_seqlens, torch.Tensor):
        raise TypeError(f"cu_seqlens must be a tensor or None, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens must have the shape [sequences + 1], got {list(cu_seqlens.shape)}")
    same_device("the student", like, cu_seqlens=cu_seqlens)
    total = like.shape[0]
    if max_seqlen is not None and (isinstance(max_seqlen, bool) or not isinstance(max_seqlen, int) or max_seqlen < 0):
        raise ValueError(f"max_seqlen must be an integer >= 0 or None, got {max_seqlen!r}")
    if readable(cu_seqlens):
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds != sorted(bounds) or bounds[-1] > total:
            raise ValueError(
                f"cu_seqlens must start at 0, never fall and end at {total} tokens at most, got {shortened(bounds)}"
            )
        longest = max((last - first for first, last in itertools.pairwise(bounds)), default=0)
        if max_seqlen is not None and max_seqlen < longest:
            raise ValueError(f"max_seqlen must be at least the longest sequence's {longest} tokens, got {max_seqlen}")
    return total if max_seqlen is None else min(max_seqlen, total)


def shortened(values: list) -> str:
    """A list as text, cut where a message would run away."""
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:8]))}, ...]"


def labels(value, shape: tuple, like: torch.Tensor, classes: int, ignore_index: int, rows) -> torch.Tensor:
    """`value` as contiguous int64 of `shape`; labels of real rows must be ignore_index or in [0, classes)."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"labels must be a tensor or None, got {type(value).__name__}")
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        raise ValueError(f"labels must hold integer class indices, got {value.dtype}")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"labels must have the shape {list(shape)} (the logits' without classes), got {list(value.shape)}"
        )
    same_device("student_logits", like, labels=value)
    if readable(value):
        bad = (value != ignore_index) & ((value < 0) | (value >= classes))
        if rows is not None:
            bad &= rows
        if bool(bad.any()):
            raise ValueError(
                f"labels must be in [0, {classes}) or ignore_index = {ignore_index}, got {int(value[bad][0])}"
            )
    return value.to(torch.int64).contiguous()


def class_indices(name: str, value, like: torch.Tensor, classes: int, rows) -> torch.Tensor:
    """`value` in the shape of `like` [..., K], integer; the classes of real rows must be in [0, classes)."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, got {value.dtype}")
    if value.shape != like.shape:
        raise ValueError(f"{name} must have the shape {list(like.shape)} of the values, got {list(value.shape)}")
    same_device("student_logits", like, **{name: value})
    if readable(value):
        real = value if rows is None else value[rows]
        bad = (real < 0) | (real >= classes)
        if bool(bad.any()):
            raise ValueError(f"{name} must be in [0, {classes}), got {int(real[bad][0])}")
    return value


def log_probabilities(name: str, value: torch.Tensor, rows) -> None:
    """The probabilities of each real row of [..., K] must not exceed 1 by more than 16-bit storage explains."""
    if readable(value):
        total = value.float().exp().sum(-1)
        bad = total > 1.02 if rows is None else (total > 1.02) & rows
        if bool(bad.any()):
            raise ValueError(
                f"{name} must be log-probabilities, whose probabilities sum to at most 1 in every row; got a sum of "
                f"{float(total[bad][0]):.4g} (logits?)"
            )


def row_temperature(value: torch.Tensor, shape: tuple, like: torch.Tensor, rows) -> torch.Tensor:
    """A temperature per row as contiguous float32 of `shape`; a tensor with one element serves all rows."""
    if value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"temperature must be a real number or a tensor of them, got {value.dtype}")
    if value.requires_grad:
        raise ValueError("temperature requires grad, but gradients flow to the student's logits only; detach it")
    if value.numel() == 1 and value.dim() <= 1:
        value = value.reshape(()).expand(shape)
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"temperature must be a number or a tensor of shape {list(shape)}, one per row; got {list(value.shape)}"
        )
    same_device("student_logits", like, temperature=value)
    if readable(value):
        bad = ~((value > 0) & torch.isfinite(value))
        if rows is not None:
            bad &= rows
        if bool(bad.any()):
            raise ValueError(f"temperature must be > 0 and finite in every row, got {float(value[bad][0])}")
    return value.to(torch.float32).contiguous()
