"""From YAML files and command-line overrides to a typed configuration. Unknown keys are fatal, `+key` included."""

import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_origin

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from echorl_nemo.errors import UserError, nearest
from echorl_nemo.schema import EvaluateConfig, RunConfig

_CHECKOUT = Path(__file__).resolve().parents[1] / "conf"
CONFIG_DIR = _CHECKOUT if _CHECKOUT.is_dir() else Path(sys.prefix) / "share" / "echorl_nemo" / "conf"
"""`conf/` of a checkout, or where an installed package put it."""

SCHEMAS: dict[str, type] = {"run_schema": RunConfig, "evaluate_schema": EvaluateConfig}
"""What a primary config names first in its defaults list, so that every key is known and typed."""

for _name, _schema in SCHEMAS.items():
    ConfigStore.instance().store(name=_name, node=_schema)

ConfigT = TypeVar("ConfigT", RunConfig, EvaluateConfig)


def load_config(
    name: str, overrides: Sequence[str] = (), config_dir: Path | None = None, *, schema: type[ConfigT]
) -> ConfigT:
    """Compose the primary config ``name`` with Hydra ``overrides`` and check it against the dataclasses of ``schema``.

    ``config_dir``: a folder of one's own, searched before the shipped `conf/`.

    Raises UserError that names the key, the value and the remedy.
    """
    folders = [CONFIG_DIR] if config_dir is None else [config_dir.resolve(), CONFIG_DIR]
    names = {path.stem: folder for folder in reversed(folders) for path in folder.glob("*.yaml")}
    if name not in names:
        raise UserError(f"--config-name={name}: no {name}.yaml; there are {', '.join(sorted(names))}")
    keys = known_keys(schema)
    free = free_keys(schema)
    _check_override_keys(overrides, folders, keys, free)
    others = ",".join(f"file://{folder}" for folder in folders if folder != names[name])
    search: list[str] = [f"hydra.searchpath=[{others}]"] if others else []
    try:
        with initialize_config_dir(str(names[name]), version_base="1.3"):
            composed = compose(name, overrides=[*overrides, *search])
        merged = OmegaConf.merge(OmegaConf.structured(schema), composed)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise UserError(f"config {name}: {', '.join(missing)} must be given, as {missing[0]}=... or in the file")
        return cast(ConfigT, OmegaConf.to_object(merged))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"config {name}: {_explain(error, keys)}") from error
    except yaml.YAMLError as error:
        raise UserError(f"config {name}: not YAML: {' '.join(str(error).split())}") from error
    except ValueError as error:  # from a section's __post_init__, which names field, value and remedy
        raise UserError(str(error)) from error


def to_yaml(config: RunConfig | EvaluateConfig) -> str:
    """The resolved configuration, as the run folder keeps it."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def known_keys(schema: Any, prefix: str = "") -> list[str]:
    """Every dotted key of the configuration."""
    keys = []
    for spec in fields(schema):
        keys.append(prefix + spec.name)
        if is_dataclass(spec.type):
            keys += known_keys(spec.type, f"{prefix}{spec.name}.")
    return keys


def free_keys(schema: Any, prefix: str = "") -> list[str]:
    """The dotted keys whose values are dictionaries of a user's own, such as `rollout.trtllm.extra`."""
    keys = []
    for spec in fields(schema):
        if get_origin(spec.type) is dict:
            keys.append(prefix + spec.name)
        elif is_dataclass(spec.type):
            keys += free_keys(spec.type, f"{prefix}{spec.name}.")
    return keys


def _check_override_keys(
    overrides: Sequence[str], directories: Sequence[Path], keys: Sequence[str], free: Sequence[str]
) -> None:
    """Hydra advises `+key` for a key that it does not know; here that is right for the entries of ``free`` alone."""
    groups = {path.name for directory in directories for path in directory.iterdir() if path.is_dir()}
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise UserError(f"overrides {list(overrides)}: {_explain(error, keys)}") from error
    for override in parsed:
        key = override.key_or_group
        if parent := next((name for name in free if key == name or key.startswith(f"{name}.")), None):
            if key == parent or not override.is_add():
                raise UserError(f"{override.input_line}: entries of {parent} are added one by one, +{parent}.key=value")
        elif key not in groups and key not in keys:
            raise UserError(f"{override.input_line}: no such key; {nearest(key, keys)}")


def _explain(error: BaseException, keys: Sequence[str]) -> str:
    """Hydra's and OmegaConf's own words on one line, with the nearest valid key where a key was not known."""
    cause: BaseException | None = error
    where = ""
    while cause is not None:
        key = getattr(cause, "full_key", None)
        if key and key not in keys:
            return f"{key}: no such key; {nearest(key, keys)}"
        where = f"{key}: " if key else where
        cause = cause.__cause__ or cause.__context__
    words = [str(error), str(error.__cause__ or "")]
    return where + " ".join(
        " ".join(text.split("\nConfig search path:")[0].split("\n    full_key:")[0] for text in words).split()
    )
