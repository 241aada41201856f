"""`kdkernels doctor`: what this installation has, which implementation each op uses and why, and whether it works.

Each loss runs once on a small input, forward and backward, and so do products and attention of quantised encoders,
forward, beside their references; the exit status is 1 if one is wrong.
"""

import importlib.util
import platform
from collections import defaultdict
from pathlib import Path

import torch

from . import _load, functional, reference


def main() -> int:
    """Prints the report; returns 0, or 1 if a part that every installation needs does not work."""
    from . import __version__

    try:
        from . import _native
    except ImportError as error:
        print(f"BROKEN: the module _native does not import ({error}); run `make build` or `pip install .` again")
        return 1

    build = _native.build_info()
    _line("kdkernels", f"{__version__} in {Path(__file__).parent}; built with {build['compiler']}")
    _line("python", f"{platform.python_version()}, {platform.platform()}")
    _line("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    _line("cpu", f"{_cpu_name()}; {_words(_native.cpu_features())}")
    problems = _report_isa(_native)
    _line("cuda library", _cuda_library(build["cuda_archs"]))
    _line("triton", _triton())
    _line("gpu", _gpu())

    if not problems:
        _report_ops()
        problems += _check("cpu")
        if torch.cuda.is_available():
            problems += _check("cuda")
    for problem in problems:
        print(f"BROKEN: {problem}")
    if not problems:
        print("All ops agree with their references.")
    return 1 if problems else 0


def _report_ops() -> None:
    """Which implementation serves which ops: those that are served alike stand together."""
    alike = defaultdict(list)
    for op, by_device in _load.explain().items():
        alike[tuple(by_device.items())].append(op)
    for by_device, ops in alike.items():
        print(f"\n{', '.join(ops)}")
        for device, text in by_device:
            print(f"  {device}: {text}")
    print()


def _line(name: str, text: str) -> None:
    print(f"{name:14} {text}")


def _words(features: dict[str, bool]) -> str:
    return " ".join(name for name, present in features.items() if present) or "baseline instructions only"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _report_isa(native) -> list[str]:
    lacks = [isa for isa, supported in native.isas().items() if not supported]
    about = f"built: {', '.join(native.isas())}" + (f"; this CPU lacks {', '.join(lacks)}" if lacks else "")
    try:
        _line("cpu kernels", f"{native.isa()} ({native.isa_reason()}); {about}")
    except RuntimeError as error:
        _line("cpu kernels", f"none; {about}")
        return [str(error)]
    return []


def _cuda_library(archs: str) -> str:
    if not archs:
        return "absent: built without nvcc, so what is CUDA C++ has no kernel for CUDA tensors"
    text = f"present, for {' '.join('sm_' + arch for arch in archs.split(','))}"
    return text if torch.version.cuda else text + "; not used: this torch is built without CUDA"


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed: losses other than kd_loss have no kernel for CUDA tensors"
    import triton

    return triton.__version__


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    names = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        names.append(f"{gpu.name} (sm_{gpu.major}{gpu.minor}, {gpu.total_memory >> 30} GiB)")
    return "; ".join(names)


def _check(device: str) -> list[str]:
    """Each op against its reference, in value and gradient."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    mask = torch.ones(2, 5, dtype=torch.bool, device=device)
    mask[1, 3:] = False
    heads = [draw(2, 2, 5, 8) for _ in range(4)]
    maps = [draw(2, 2, 5, 5) for _ in range(2)]
    named = draw(2, 5, 17).topk(4)
    calls = {
        "kd_loss": ([draw(2, 5, 17), draw(2, 5, 17)], {"temperature": 2.0, "mask": mask}),
        "linear_kd_loss": ([draw(2, 5, 8), draw(17, 8), draw(2, 5, 12), draw(17, 12)], {"mask": mask}),
        "topk_kd_loss": ([draw(2, 5, 17), named.values, named.indices], {"mask": mask}),
        "attention_kl": (heads, {"mask": mask}),
        "attention_mse": (heads, {"mask": mask}),
        "attention_map_mse": (maps, {"mask": mask}),
        "attention_map_kl": (maps, {"mask": mask}),
        "relation_kl": ([draw(2, 5, 12), draw(2, 5, 16)], {"mask": mask, "num_heads": 2}),
        "hidden_mse": ([draw(2, 5, 12), draw(2, 5, 12)], {"mask": mask}),
        "hidden_cosine": ([draw(2, 5, 12), draw(2, 5, 12)], {"mask": mask}),
        "gram_mse": ([draw(2, 5, 12) for _ in range(4)], {"mask": mask}),
        "moment_mse": ([draw(2, 5, 12), draw(2, 5, 12)], {"mask": mask}),
    }
    problems = []
    for name, (tensors, options) in calls.items():
        try:
            ours, truth = (_run(getattr(face, name), tensors, options) for face in (functional, reference))
        except RuntimeError as error:
            problems.append(f"{name} on {device}: {str(error).splitlines()[0].split('. ')[0]}")
            continue
        if not all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(ours, truth, strict=True)):
            problems.append(f"{name} on {device} disagrees with its reference")
    return problems + _check_quantised(device, draw)


def _check_quantised(device: str, draw) -> list[str]:
    """A product with packed weights, and attention on packed tokens, against their references."""
    from . import quant

    packed = quant.pack(draw(32, 64), quant.NAMED["int4"])
    x, tokens = draw(5, 64), [draw(7, 16) for _ in range(3)]
    lengths = torch.tensor([0, 3, 7], dtype=torch.int32, device=device)
    calls = {
        "quant_linear": (lambda: quant.linear(x, packed), lambda: reference.quant_linear(x, packed).float()),
        "varlen_attention": (
            lambda: torch.ops.kdkernels.varlen_attention(*tokens, lengths, 2, 0.3),
            lambda: reference.varlen_attention(*tokens, lengths, 2, 0.3),
        ),
    }
    problems = []
    for name, (ours, truth) in calls.items():
        try:
            right = torch.allclose(ours(), truth(), rtol=2e-2, atol=2e-2)  # attention's products are bf16 on a GPU
        except RuntimeError as error:
            problems.append(f"{name} on {device}: {str(error).splitlines()[0]}")
            continue
        if not right:
            problems.append(f"{name} on {device} disagrees with its reference")
    return problems


def _run(function, tensors: list[torch.Tensor], options: dict) -> tuple[torch.Tensor, torch.Tensor]:
    student = tensors[0].clone().requires_grad_()
    loss = function(student, *tensors[1:], **options)
    loss.backward()
    return loss.detach(), student.grad
