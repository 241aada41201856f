"""The demo's texts: first paragraphs of the docstrings of the running interpreter's standard library, or a file of
one's own.

About 7,000 real English texts that every Python brings along. The order and the split depend on the texts alone.
"""

import ast
import random
import sysconfig
from pathlib import Path

from ..distill.data import read
from ..distill.errors import DistillError

_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
_HELD_OUT = 1000


def texts(path: str | None) -> tuple[list[str], list[str]]:
    """(training texts, held-out texts), no text twice. Held out: 1,000, at most a fifth of all."""
    found = docstrings() if path is None else [example["text"] for example in read(path)]
    unique = sorted(set(found))
    if len(unique) < 100:
        raise DistillError(
            f"text {path}: {len(unique)} different texts are too few to distil from; at least 100 are needed"
        )
    random.Random(0).shuffle(unique)
    held_out = min(_HELD_OUT, len(unique) // 5)
    return unique[held_out:], unique[:held_out]


def docstrings() -> list[str]:
    """First paragraphs, as one line, of every module, class and function of the standard library; at least four words
    each.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED.isdisjoint(path.relative_to(root).parts):
            found += _first_paragraphs(path)
    return found


def _first_paragraphs(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # the library ships a few files for the parser's own tests
        return []
    nodes = (
        n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    )
    first = (" ".join((ast.get_docstring(node) or "").strip().split("\n\n")[0].split()) for node in nodes)
    return [text for text in first if len(text.split()) >= 4 and not text.startswith(">>>")]
