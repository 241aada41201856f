"""The examples and the code in docs/ and in the README run and say what is so."""

import difflib
import re
import runpy
from pathlib import Path

import pytest
import torch
import transformers

from kdkernels import functional
from kdkernels.quant.encoder import PaddingFree
from kdkernels.quant.modules import QuantLinear

from . import tiny

DOCS = Path(__file__).parent.parent / "docs"
EAGER, FUSED = DOCS / "examples" / "tinybert_eager.py", DOCS / "examples" / "tinybert_fused.py"

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_swapped_loop_trains_alike():
    """The same loss at every step, which takes the same gradients at the steps before."""
    plain, fused = (runpy.run_path(str(path))["train"](steps=8) for path in (EAGER, FUSED))
    assert plain[-1] < 0.8 * plain[0]
    assert fused == pytest.approx(plain, rel=1e-5)


def test_the_swap_is_a_handful_of_lines():
    plain, fused = (path.read_text().split('"""', 2)[2].splitlines() for path in (EAGER, FUSED))
    written = [line for line in difflib.ndiff(plain, fused) if line.startswith("+ ") and line.strip("+ ")]
    assert len(written) <= 5


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


PAGE = (DOCS / "losses.md").read_text()
SECTIONS = dict(re.findall(r"^## `(\w+)`\n(.*?)(?=^## )", PAGE, re.MULTILINE | re.DOTALL))


def test_every_loss_has_a_section():
    """In the order of its parts, with code that calls it."""
    assert set(SECTIONS) == set(functional.__all__)
    for name, section in SECTIONS.items():
        parts = re.findall(r"\*\*(Source|Shapes|Cost|Kept|Used by|Replaces)\*\*", section)
        assert parts == ["Source", "Shapes", "Cost", "Kept", "Used by", "Replaces"], name
        assert re.search("^    ", section, re.MULTILINE) and f"loss = K.{name}(" in section, name


def test_the_code_runs():
    """All blocks of the page, one after the other, each up to its backward."""
    torch.manual_seed(0)
    names, losses = {}, []
    for block in blocks(PAGE):
        exec(block, names)
        losses += [names.pop("loss")] if "loss" in names else []
    assert len(losses) == len(SECTIONS) + 1 and all(loss.isfinite() for loss in losses)


def test_the_code_of_the_readme_runs(tmp_path, monkeypatch):
    swap, quantise = blocks((DOCS.parent / "README.md").read_text())
    student = torch.randn(4, 6, requires_grad=True)
    names = {"student_logits": student, "teacher_logits": torch.randn(4, 6), "labels": torch.arange(4)}
    names |= {name: torch.randn(4, 2, 5, 8) for name in ("q_s", "k_s", "q_t", "k_t")}
    names["attention_mask"] = torch.ones(4, 5)
    exec(swap, names)
    assert names["loss"].isfinite() and student.grad.abs().sum() > 0
    tiny.bert().save_pretrained(tmp_path / "path/to/encoder")
    monkeypatch.chdir(tmp_path)
    exec(quantise, {})
    assert isinstance(transformers.AutoModel.from_pretrained("path/to/quantised"), PaddingFree)


def test_the_code_of_quantization_runs():
    """In the order of the page, each block on a model of its own, which it leaves quantised."""
    names = {"batches": [tiny.batch(labels=True)]}
    for block in blocks((DOCS / "quantization.md").read_text()):
        model = names["model"] = tiny.bert(head=True)
        exec(block, names)
        assert isinstance(model.bert, PaddingFree) and any(isinstance(part, QuantLinear) for part in model.modules())
