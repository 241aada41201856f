"""Checkpoints on disk: found, checked before they are trusted, and student folders that appear whole or not at all."""

import json
import os
import re
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import DistillError

STAGE_FILE = "stage.safetensors"
# Patterns, because FSDP writes folders where a single process writes files.
_NEEDED = ("*model*", "optimizer*", "scheduler.pt", "trainer_state.json")


def latest(folder: str | os.PathLike) -> Path | None:
    """The newest complete checkpoint of a run, or None. Folders that lack a file are passed over: they were never
    finished.
    """
    found = [
        (int(p.name.rpartition("-")[2]), p)
        for p in Path(folder).glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", p.name)
    ]
    complete = [(step, path) for step, path in found if not _missing(path)]
    return max(complete)[1] if complete else None


def check(checkpoint: str | os.PathLike) -> None:
    """Reads a checkpoint's structure and sums. Raises DistillError naming the first file that is missing or damaged."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise DistillError(f"checkpoint {folder}: no such folder")
    missing = _missing(folder)
    if missing:
        raise DistillError(f"checkpoint {folder}: {missing} is missing; delete the folder to go on from the one before")
    for path in sorted(folder.iterdir()):
        try:
            _read(path)
        except (SafetensorError, zipfile.BadZipFile, ValueError, OSError) as error:
            raise DistillError(
                f"checkpoint {folder}: {path.name} is corrupt ({error}); delete the folder to go on from the one before"
            ) from error


def _missing(folder: Path) -> str | None:
    """The first kind of file that a finished checkpoint has and this folder does not."""
    return next((pattern for pattern in _NEEDED if not any(folder.glob(pattern))), None)


def _read(path: Path) -> None:
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt"):
            pass
    elif path.suffix in (".pt", ".pth"):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{damaged} has a wrong checksum")
    elif path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))


def export(model: PreTrainedModel, state: dict, tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike) -> None:
    """Writes a plain transformers folder that AutoModel.from_pretrained loads; it appears by one rename."""
    folder = Path(folder)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished, state_dict=state)
    tokenizer.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a file by one rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
