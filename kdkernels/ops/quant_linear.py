"""quant_linear: schema and fake; for inference, so there is no autograd. quant_prepare lays a packed weight out for the
device that it is on, once; quant_restore, on the CPU, gives the packed weight back, given the 64 bytes of its header.
`layout` is that of PackedWeight; the CPU's kernels need none."""

import torch

from ._common import LIBRARY, define

ACTIVATION = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "tanh": 4}

define("quant_prepare(Tensor packed) -> Tensor")
define("quant_restore(Tensor prepared, Tensor header) -> Tensor")
define(
    "quant_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, SymInt out_features, int activation, "
    "bool quantize, float input_scale, int layout=0) -> Tensor"
)


@torch.library.register_fake("kdkernels::quant_prepare", lib=LIBRARY)
def _(packed):
    return packed.new_empty(torch.library.get_ctx().new_dynamic_size())  # it depends on what the header says


@torch.library.register_fake("kdkernels::quant_restore", lib=LIBRARY)
def _(prepared, header):
    return prepared.new_empty(torch.library.get_ctx().new_dynamic_size())


@torch.library.register_fake("kdkernels::quant_linear", lib=LIBRARY)
def _(x, weight, bias, residual, out_features, activation, quantize, input_scale, layout=0):
    return x.new_empty((*x.shape[:-1], out_features))


def _no_gradient(ctx, *grads):
    raise RuntimeError(
        "kdkernels.quant_linear is for inference and has no gradient; run it under torch.no_grad() or "
        "torch.inference_mode()"
    )


torch.library.register_autograd("kdkernels::quant_linear", _no_gradient, lib=LIBRARY)
