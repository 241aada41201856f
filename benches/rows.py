"""Rows of results, added to a CSV."""

import csv
from collections.abc import Sequence
from pathlib import Path


def append(path: Path, columns: Sequence[str], rows: list[dict]) -> None:
    """Adds rows, with the header where the file is new. Floats are written with six digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
