"""The YAML file of `kdkernels distill`: checked key by key, then handed to the runner. Its keys:

    recipe: minilm                  hinton, tinybert or minilm
    teacher: FOLDER or NAME         or a list: their mean
    output: FOLDER
    data: {train: FILE, labels: none or leading}
    tokenizer, student, seed, batch_size (over all processes), epochs, max_length, cache_teacher
    options: {...}                  of the recipe
    training: {...}                 of transformers.TrainingArguments
    stages: {NAME: {...}}           teacher, data, epochs, batch_size, max_length, cache_teacher, training of a stage

Examples lie in kdkernels/recipes/configs.
"""

from dataclasses import dataclass
from pathlib import Path

import yaml
from transformers import AutoConfig

from .data import read
from .errors import DistillError, unknown
from .run import StageRun, check_training, load
from .schedules import from_config
from .stages import Recipe, options_of

_STAGE_KEYS = ("teacher", "data", "epochs", "batch_size", "max_length", "cache_teacher", "training")
_KEYS = ("recipe", "output", "tokenizer", "student", "seed", "options", "stages", *_STAGE_KEYS)


@dataclass
class Job:
    """A checked config: everything that `run` takes."""

    recipe: Recipe
    stages: list[StageRun]
    output: Path
    tokenizer: str
    student: str | None
    seed: int
    identity: dict


def load_config(path: str) -> Job:
    """Reads and checks a config file. Raises DistillError naming the key, what was given and what is accepted."""
    file = Path(path)
    if not file.is_file():
        raise DistillError(f"config {path}: no such file")
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DistillError(f"config {path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(config, dict):
        raise DistillError(f"config {path}: a mapping of keys is expected, accepted: {', '.join(_KEYS)}")
    try:
        return _job(config)
    except DistillError as error:
        raise DistillError(f"config {path}: {error}") from error


def _job(config: dict) -> Job:
    from ..recipes import RECIPES

    _keys(config, _KEYS, "key")
    for key in ("recipe", "teacher", "output", "data"):
        if key not in config and not (key in ("teacher", "data") and "stages" in config):
            raise DistillError(f"{key} is missing")
    if config["recipe"] not in RECIPES:
        raise unknown("recipe", config["recipe"], RECIPES)
    make = RECIPES[config["recipe"]]
    options = {name: from_config(value) for name, value in _mapping(config, "options").items()}
    _keys(options, options_of(make), f"option of recipe {config['recipe']}")
    overrides = _mapping(config, "stages")
    own = [stage["teacher"] for stage in overrides.values() if isinstance(stage, dict) and "teacher" in stage]
    teacher_name = _teachers(own[-1] if own else config.get("teacher"))[0]
    try:
        recipe = make(_teacher_config(teacher_name), **options)
    except TypeError as error:
        raise DistillError(f"options of recipe {config['recipe']}: {error}") from error
    _keys(overrides, [stage.name for stage in recipe.stages], "stage")
    seed = config.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise DistillError(f"seed must be an integer >= 0, got {seed!r}")
    shared = {key: config[key] for key in _STAGE_KEYS if key in config}
    return Job(
        recipe=recipe,
        stages=[_stage(shared, overrides.get(stage.name) or {}, stage.name) for stage in recipe.stages],
        output=Path(str(config["output"])),
        tokenizer=config.get("tokenizer", teacher_name),
        student=config.get("student"),
        seed=seed,
        identity=config,
    )


def _stage(shared: dict, own: dict, name: str) -> StageRun:
    if not isinstance(own, dict):
        raise DistillError(f"stages.{name} must be a mapping of {', '.join(_STAGE_KEYS)}")
    _keys(own, _STAGE_KEYS, f"key in stages.{name}")
    merged = shared | own
    training = check_training(_mapping(shared, "training") | _mapping(own, "training"), "training")
    for key in ("teacher", "data"):
        if key not in merged:
            raise DistillError(f"stage {name!r} has no {key}: give it at the top or in stages.{name}")
    data = _mapping(merged, "data")
    _keys(data, ("train", "labels"), "key in data")
    if "train" not in data:
        raise DistillError("data.train is missing: a file with one text a line, or .jsonl")
    if data.get("labels", "none") not in ("none", "leading"):
        raise unknown("value of data.labels", data["labels"], ("none", "leading"))
    return StageRun(
        examples=read(str(data["train"]), data.get("labels", "none")),
        teachers=_teachers(merged["teacher"]),
        batch_size=_number(merged, "batch_size", 32, int),
        epochs=_number(merged, "epochs", None, float),
        max_length=_number(merged, "max_length", 128, int),
        cache_teacher=bool(merged.get("cache_teacher", False)),
        training=training,
    )


def _teachers(value) -> list[str]:
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise DistillError(f"teacher must be a folder, a Hugging Face name, or a list of them; got {value!r}")
    return names


def _teacher_config(name: str):
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise DistillError(
            f"teacher {name!r}: not a model folder or Hugging Face name ({str(error).splitlines()[0]})"
        ) from error


def _mapping(config: dict, key: str) -> dict:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise DistillError(f"{key} must be a mapping, got {value!r}")
    return value


def _keys(given, accepted, what: str) -> None:
    for key in given:
        if key not in accepted:
            raise unknown(what, key, accepted)


def _number(config: dict, key: str, default, kind: type):
    value = config.get(key, default)
    if value is None:
        return None
    try:
        number = kind(value)
    except (TypeError, ValueError):
        number = None
    if number is None or isinstance(value, bool) or number != float(value) or number <= 0:
        raise DistillError(f"{key} must be {'an integer' if kind is int else 'a number'} > 0, got {value!r}")
    return number


def student_of(job: Job):
    """The function that makes the untrained student where the config names one, else None (the recipe's surgery)."""
    return None if job.student is None else lambda: load(job.student, job.recipe.head, "student").requires_grad_(True)
