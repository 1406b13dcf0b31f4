"""Composes YAML files and command-line overrides into a typed configuration. Unknown keys are errors, also with `+`."""

import re
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_origin

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from echorl_nemo.checks.keys import key_problems, parse_overrides
from echorl_nemo.errors import UserError, did_you_mean
from echorl_nemo.ops.ranges import KINDS
from echorl_nemo.schema import EvaluateConfig, RunConfig
from echorl_nemo.shipped import CONFIG_DIR, ROOT

SCHEMAS: dict[str, type] = {"run_schema": RunConfig, "evaluate_schema": EvaluateConfig}
"""Schemas by name. A primary config names one first in its defaults list, so that every key is known and typed."""

for _name, _schema in SCHEMAS.items():
    ConfigStore.instance().store(name=_name, node=_schema)

# `${shipped:examples/...}` in a configuration is the path of a file that comes with the package
OmegaConf.register_new_resolver("shipped", lambda name: str(ROOT / name), replace=True)

ConfigT = TypeVar("ConfigT", RunConfig, EvaluateConfig)


def load_config(
    name: str, overrides: Sequence[str] = (), config_dir: Path | None = None, *, schema: type[ConfigT]
) -> ConfigT:
    """Compose the primary config ``name`` with Hydra ``overrides`` and check it against the dataclasses of ``schema``.

    ``config_dir``: a folder of the user's own, searched before the shipped `conf/`.

    Raises UserError with every problem, one a line: each names the key, the value and the remedy.
    """
    name = name.removesuffix(".yaml")
    if config_dir is not None and not config_dir.is_dir():
        raise UserError(f"--config-dir={config_dir}: no such folder; name one that holds {name}.yaml")
    folders = [CONFIG_DIR] if config_dir is None else [config_dir.resolve(), CONFIG_DIR]
    names = {path.stem: folder for folder in reversed(folders) for path in folder.glob("*.yaml")}
    if name not in names:
        raise UserError(f"--config-name={name}: no {name}.yaml; there are {', '.join(sorted(names))}")
    keys = known_keys(schema)
    parsed, problems = parse_overrides(overrides, names)
    problems += key_problems(parsed, folders, keys, dictionary_keys(schema))
    if problems:
        raise UserError("\n".join(problems))
    others = ",".join(f'"file://{folder}"' for folder in folders if folder != names[name])
    search: list[str] = [f"hydra.searchpath=[{others}]"] if others else []
    try:
        with initialize_config_dir(str(names[name]), version_base="1.3"):
            merged, problems = _compose_all(name, parsed, search, schema, keys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config {name}: not YAML in UTF-8: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UserError(f"config {name}: it includes itself; look at its defaults") from error
    except (ValueError, TypeError, AttributeError) as error:  # raised for a `defaults` that is not a list
        raise UserError(f"config {name}: {' '.join(str(error).split())}; make its defaults a list") from error
    if merged is not None:
        config = _instantiate(merged, schema, f"config {name}", problems)
    if problems:
        raise UserError("\n".join(problems))
    return cast(ConfigT, config)


def to_yaml(config: RunConfig | EvaluateConfig) -> str:
    """The resolved configuration as YAML text, which the run folder keeps and `load_config` reads back unchanged."""
    return OmegaConf.to_yaml(OmegaConf.create(_without_interpolations(asdict(config))))


def _without_interpolations(value: Any) -> Any:
    """``value`` with every `${` in its texts escaped, since a Jinja template may hold one that OmegaConf must not
    read."""
    if isinstance(value, str):
        return value.replace("${", "\\${")
    if isinstance(value, dict):
        return {key: _without_interpolations(item) for key, item in value.items()}
    return [_without_interpolations(item) for item in value] if isinstance(value, (list, tuple)) else value


def known_keys(schema: Any, prefix: str = "") -> list[str]:
    """Every dotted key of the configuration."""
    keys = []
    for spec in fields(schema):
        keys.append(prefix + spec.name)
        if is_dataclass(spec.type):
            keys += known_keys(spec.type, f"{prefix}{spec.name}.")
    return keys


def dictionary_keys(schema: Any, prefix: str = "") -> list[str]:
    """The dotted keys whose values are dictionaries with entries of the user's choice, like `rollout.trtllm.extra`."""
    keys = []
    for spec in fields(schema):
        if get_origin(spec.type) is dict:
            keys.append(prefix + spec.name)
        elif is_dataclass(spec.type):
            keys += dictionary_keys(spec.type, f"{prefix}{spec.name}.")
    return keys


def _compose_all(
    name: str, parsed: Sequence[Override], search: list[str], schema: type[ConfigT], keys: Sequence[str]
) -> tuple[DictConfig | None, list[str]]:
    """The merged configuration without the overrides whose values have a wrong type, and a problem for each of them.
    None instead of the configuration if the files themselves are wrong."""
    left: list[Override] = list(parsed)
    problems: list[str] = []
    while True:
        merged, error = _try_compose(name, left, search, schema)
        if error is None:
            return merged, problems
        wrong = next((each for each in reversed(left) if each.key_or_group == _key_of(error)), None)
        if wrong is None:  # an entry of a list or dictionary: the override without which there is no error
            rest = ((each, [other for other in left if other is not each]) for each in left)
            wrong = next((each for each, others in rest if _try_compose(name, others, search, schema)[1] is None), None)
        if wrong is None:
            return None, [*problems, f"config {name}: {_explain(error, keys)}"]
        problems.append(f"{wrong.input_line}: {_words(error)}")
        left = [each for each in left if each is not wrong]


def _try_compose(
    name: str, overrides: Sequence[Override], search: list[str], schema: type[ConfigT]
) -> tuple[DictConfig | None, Exception | None]:
    try:
        composed = compose(name, overrides=[*(str(each.input_line) for each in overrides), *search])
        merged = OmegaConf.merge(OmegaConf.structured(schema), composed)
    except (HydraException, OmegaConfBaseException) as error:
        return None, error
    assert isinstance(merged, DictConfig)
    return merged, None


def _instantiate(node: Any, schema: Any, where: str, problems: list[str]) -> Any:
    """The dataclass of a section. Adds to ``problems`` what its checks find, and goes on with the next section."""
    values = {}
    for spec in fields(schema):
        try:
            if is_dataclass(spec.type):
                values[spec.name] = _instantiate(node[spec.name], spec.type, where, problems)
            else:
                value = node[spec.name]
                values[spec.name] = OmegaConf.to_object(value) if OmegaConf.is_config(value) else value
        except MissingMandatoryValue as error:
            key = _key_of(error)
            problems.append(f"{where}: {key} must be given, as {key}=... or in the file")
        except OmegaConfBaseException as error:  # an interpolation names a key that does not exist
            problems.append(f"{where}: {_key_of(error)}: {_words(error)}")
        except ValueError as error:  # raised by an element of a list or dictionary
            problems += str(error).splitlines()
    try:
        return schema(**values)
    except ValueError as error:
        problems += str(error).splitlines()
        return None


def _key_of(error: BaseException) -> str:
    """The key that an error of Hydra or OmegaConf names; empty if it names none."""
    cause: BaseException | None = error
    found = ""
    while cause is not None:
        found = str(getattr(cause, "full_key", None) or "") or found
        cause = cause.__cause__ or cause.__context__
    return found


def _explain(error: BaseException, keys: Sequence[str]) -> str:
    """Hydra's or OmegaConf's message on one line, or the nearest valid key where a key is unknown."""
    key = _key_of(error)
    if key and key not in keys:
        return f"{key}: no such key; {did_you_mean(key, keys)}"
    return (f"{key}: " if key else "") + _words(error)


NODES = {"Integer": KINDS[int], "Float": KINDS[float], "Boolean": KINDS[bool], "String": KINDS[str]}
"""OmegaConf's names of types in plain words."""


def _words(error: BaseException) -> str:
    """The message of an error of Hydra or OmegaConf on one line, in plain words where the type is wrong."""
    words = [str(error), str(error.__cause__ or "")]
    joined = " ".join(words)
    if found := re.search(r"Value '(.*?)' of type '\w+' could not be converted to (\w+)", joined, re.DOTALL):
        return f"{found[1]!r} is not {NODES.get(found[2], found[2])}"
    if "is not a subclass of" in joined:
        return "this configuration is for another command (train and plan, or evaluate and analyze); choose another"
    if "is not Optional" in joined:
        return "null is not allowed; give a value"
    short = [text.split("\nConfig search path:")[0].split("\n    full_key:")[0] for text in words]
    return " ".join(" ".join(short).split())
