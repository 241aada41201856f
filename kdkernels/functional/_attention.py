"""What is legal for queries, keys and what comes with them."""

import torch

from .. import _checks


def queries_and_keys(q_s, k_s, q_t, k_t, scale_s, scale_t, packed, *, grouped=False, any_heads=False):
    """Shapes, devices and the teacher's grad; returns both scales as numbers.

    grouped: keys may have fewer heads than their queries; any_heads: the teacher may have as many heads as it likes.
    """
    layout = "[tokens, heads, d]" if packed else "[batch, heads, tokens, d]"
    for name, x in (("q_s", q_s), ("k_s", k_s), ("q_t", q_t), ("k_t", k_t)):
        _checks.tensor(name, x)
        if x.dim() != (3 if packed else 4):
            given = "with cu_seqlens" if packed else "without cu_seqlens"
            raise ValueError(
                f"{name} must have {3 if packed else 4} dimensions {layout} {given}, got shape {list(x.shape)}"
            )
        if x.shape[-1] == 0:
            raise ValueError(f"{name} must have a head size of at least 1, got shape {list(x.shape)}")
        if x.shape[1] == 0:
            raise ValueError(f"{name} must have at least one head, got shape {list(x.shape)}")
    for side, q, k in (("s", q_s, k_s), ("t", q_t, k_t)):
        shares = grouped and q.shape[1] % k.shape[1] == 0
        if q.shape[:1] != k.shape[:1] or q.shape[2:] != k.shape[2:] or (q.shape[1] != k.shape[1] and not shares):
            heads = ", or fewer heads whose number divides its" if grouped else ""
            raise ValueError(
                f"k_{side} must have the shape of q_{side}, {layout}{heads}; got q_{side} {list(q.shape)}, "
                f"k_{side} {list(k.shape)}"
            )
    if q_s.shape[1] != q_t.shape[1] and not any_heads:
        more = "head_reduction and head_map compare others, " if grouped else ""
        raise ValueError(
            f"student and teacher must have as many heads; got q_s {list(q_s.shape)} and q_t {list(q_t.shape)} "
            f"({more}relation_kl re-splits heads)"
        )
    if q_s.shape[0] != q_t.shape[0] or q_s.shape[2:-1] != q_t.shape[2:-1]:
        raise ValueError(
            f"q_t must agree with q_s in batch and tokens; got q_s {list(q_s.shape)}, q_t {list(q_t.shape)}"
        )
    _checks.teacher("q_t", q_t)
    _checks.teacher("k_t", k_t)
    _checks.same_device("q_s", q_s, k_s=k_s, q_t=q_t, k_t=k_t)
    return (
        q_s.shape[-1] ** -0.5 if scale_s is None else _checks.number("scale_s", scale_s),
        q_t.shape[-1] ** -0.5 if scale_t is None else _checks.number("scale_t", scale_t),
    )


def head_map(value, heads_s: int, heads_t: int) -> list[int]:
    """The teacher's head for each of the student's; [] for None."""
    if value is None:
        return []
    if not isinstance(value, (list, tuple)) or any(isinstance(h, bool) or not isinstance(h, int) for h in value):
        raise TypeError(f"head_map must be a list of integers or None, got {value!r}")
    if len(value) != heads_s:
        raise ValueError(f"head_map must name a teacher's head for each of the student's {heads_s}, got {len(value)}")
    wrong = [h for h in value if not 0 <= h < heads_t]
    if wrong:
        raise ValueError(f"head_map must name heads of the teacher in [0, {heads_t}), got {wrong[0]}")
    return list(value)


def bias(name: str, value, q: torch.Tensor, sequences: int, tokens: int) -> torch.Tensor | None:
    """`value` expanded to [sequences, heads, tokens, tokens], stride 0 where it is broadcast."""
    if value is None:
        return None
    _checks.tensor(name, value)
    if value.requires_grad:
        raise ValueError(f"{name} requires grad, but no gradient flows to a bias; pass a detached tensor")
    _checks.same_device("q_s", q, **{name: value})
    shape = (sequences, q.shape[1], tokens, tokens)
    given = (1,) * (4 - value.dim()) + tuple(value.shape)
    if len(given) != 4 or any(have not in (1, want) for have, want in zip(given, shape, strict=True)):
        raise ValueError(f"{name} must be broadcastable to {list(shape)}, got {list(value.shape)}")
    return value.expand(shape)


def lse(name: str, value, q: torch.Tensor) -> torch.Tensor | None:
    """`value`, one number per row of q's maps."""
    if value is None:
        return None
    _checks.tensor(name, value)
    if value.dtype != torch.float32:
        raise ValueError(f"{name} must be float32, got {value.dtype}")
    if value.shape != q.shape[:-1]:
        raise ValueError(f"{name} must have the shape {list(q.shape[:-1])}, got {list(value.shape)}")
    _checks.same_device("q_s", q, **{name: value})
    return value.detach()
