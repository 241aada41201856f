"""gram_mse on CUDA: the products are cuBLAS's, of a strip of rows at a time, so that no whole Gram matrix is ever held.

With the rows of X being tokens, or features over the hidden axis, a strip of E = a X_0 X_1^T - b Y_0 Y_1^T gives its
part of the loss and of both gradients, 2 w a E X_1 and 2 w a E^T X_0, and is forgotten. Backward makes the strips
again. Both sides go through the same products: equal inputs give exactly 0.
"""

import torch

from ..ops._common import OVER
from ._common import register

STRIP = 256


def _factors(states, mask, over):
    """The states as rows [B, rows, depth], float32, padding 0; None stays None."""
    rows = []
    for x in states:
        if x is not None:
            x = x.float() if mask is None else torch.where(mask[:, :, None], x, 0).float()
            x = x if over == OVER["token"] else x.mT
        rows.append(x)
    return rows


def _scales(s0, t0, mask, over):
    """a and b, which broadcast over [B, rows, rows], and how many entries (over hidden: matrices) the mean is of."""
    batch, tokens, width = s0.shape
    real = s0.new_full((batch,), tokens, dtype=torch.float32) if mask is None else mask.sum(1, dtype=torch.float32)
    if over == OVER["token"]:
        return 1.0 / width, 1.0 / t0.shape[2], real.double().square().sum().clamp_min(1)
    scale = real.clamp_min(1).reciprocal()[:, None, None]
    return scale, scale, (real > 0).sum().double().clamp_min(1)


def _strips(x0, x1, y0, y1, a, b):
    """(first row, E of the strip from there on)."""
    for first in range(0, x0.shape[1], STRIP):
        rows = slice(first, first + STRIP)
        yield rows, a * (x0[:, rows] @ x1.mT) - b * (y0[:, rows] @ y1.mT)


def _prepare(s0, s1, t0, t1, mask, over):
    x0, x1, y0, y1 = _factors((s0, s1, t0, t1), mask, over)
    x1, y1 = x0 if x1 is None else x1, y0 if y1 is None else y1
    a, b, entries = _scales(s0, t0, mask, over)
    if over == OVER["hidden"]:
        entries = entries * (x0.shape[1] * x1.shape[1])
    return x0, x1, y0, y1, a, b, entries


def gram_mse(s0, s1, t0, t1, mask, over, need_grad):
    *factors, entries = _prepare(s0, s1, t0, t1, mask, over)
    total = s0.new_zeros((), dtype=torch.float64)
    for _, e in _strips(*factors):
        total += e.square().sum(dtype=torch.float64)
    return (total / entries).float(), []


def gram_mse_backward(grad, s0, s1, t0, t1, mask, saved, over):
    x0, x1, y0, y1, a, b, entries = _prepare(s0, s1, t0, t1, mask, over)
    d0, d1 = torch.zeros_like(x0), torch.zeros_like(x1)
    for rows, e in _strips(x0, x1, y0, y1, a, b):
        e *= 2 * a * grad / entries.float()
        d0[:, rows] = e @ x1
        d1 += e.mT @ x0[:, rows]
    grads = [d0 + d1] if s1 is None else [d0, d1]
    grads = [d if over == OVER["token"] else d.mT for d in grads]
    return [d.to(x.dtype).contiguous() for d, x in zip(grads, (s0, s1), strict=False)]


register("gram_mse", gram_mse)
register("gram_mse_backward", gram_mse_backward)
