"""From what the user gave to ServeOptions and Settings: what is refused, contradicts itself, or needs no doing."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from tokenplane_core.backend.errors import ConfigError

from .flags import BY_NAME, FLAGS, VARIABLES, Flag, Variable
from .settings import ServeOptions, Settings

ANY_ADDRESS = "0.0.0.0"

KERNELS_OF_TGI = ("paged", "flashdecoding", "flashdecoding-ipex")

LEVELS = {
    "trace": "DEBUG",
    "debug": "DEBUG",
    "info": "INFO",
    "warn": "WARNING",
    "warning": "WARNING",
    "error": "ERROR",
}


@dataclass(frozen=True, slots=True)
class Launch:
    """What to serve, the variables that libraries and the engine's process read, and what the user should know."""

    options: ServeOptions
    settings: Settings
    variables: dict[str, str]
    notices: list[str]


def plan_launch(values: Mapping[str, Any], sources: Mapping[str, str], environment: Mapping[str, str]) -> Launch:
    """Decide about each flag and each variable of the tables.

    values: by parameter name, None where nothing was given. sources: where the given ones come from.

    Raises:
        ConfigError: something is refused or contradicts itself; names flag, value and what to do.
    """
    given = {name: value for name, value in values.items() if name in sources}
    _refuse(given, sources, environment)
    _refuse_contradictions(given)
    notices = [*_needless(given, sources, environment)]
    if "max_input_length" in given:
        given["max_input_tokens"] = given["max_input_length"]
    if "hostname" in given and sources["hostname"] == "HOSTNAME" and not is_ip_address(given["hostname"]):
        # Containers set HOSTNAME to a name that says nothing about where to listen; an option means what it says.
        name = given.pop("hostname")
        notices.append(f"The environment sets HOSTNAME to {name!r}, which is no IP address; listening on {ANY_ADDRESS}")
    if "cors_allow_origin" in given:
        given["cors_allow_origin"] = tuple(given["cors_allow_origin"])
    decided = _fields(given, environment)
    return Launch(
        ServeOptions(**_those_of(ServeOptions, decided)),
        Settings(**_those_of(Settings, decided)),
        _variables(given, environment),
        notices,
    )


def log_level(said: str | None) -> str:
    """A level of Python's for LOG_LEVEL, which may hold filters for single modules too, as in `info,tower=warn`.

    Raises:
        ConfigError: it names no level.
    """
    for part in (said or "info").lower().split(","):
        if part.strip() in LEVELS:
            return LEVELS[part.strip()]
    raise ConfigError(f"LOG_LEVEL is {said!r}, which names no level; known are {', '.join(LEVELS)}")


def is_ip_address(hostname: str) -> bool:
    try:
        ipaddress.ip_address(hostname)
    except ValueError:
        return False
    return True


def _fields(given: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """What the fields hold that flags and variables name."""
    decided = {flag.field: given[flag.parameter] for flag in FLAGS if flag.field and flag.parameter in given}
    for variable in _variables_given("honoured", environment):
        text = environment[variable.name]
        if variable.field:
            decided[variable.field] = _port(variable.name, text) if variable.field == "port" else text
    return decided


def _port(variable: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 65536):
        raise ConfigError(f"{variable} is {text!r}; it must be a port, from 0 to 65535")
    return int(text)


def _those_of(record: type, values: Mapping[str, Any]) -> dict[str, Any]:
    return {item.name: values[item.name] for item in fields(record) if item.name in values}


def _variables(given: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, str]:
    """What is handed on by variables, since others read them."""
    handed_on = {"LOG_LEVEL": log_level(environment.get("LOG_LEVEL"))}
    if "attention" in given:
        handed_on["TOKENPLANE_ATTENTION"] = given["attention"]
    if token := environment.get("HF_API_TOKEN"):
        handed_on["HF_TOKEN"] = token
    return handed_on


# --- Refused, needless --------------------------------------------------------------------------------------


def _refuse(given: Mapping[str, Any], sources: Mapping[str, str], environment: Mapping[str, str]) -> None:
    for flag in _those_given("refused", given):
        if given[flag.parameter] not in flag.idle:
            raise ConfigError(f"{_said(flag, given, sources)}, which is not done here: {flag.why}")
    for variable in _variables_given("refused", environment):
        value = environment[variable.name]
        if value.lower() not in variable.idle:
            raise ConfigError(f"{variable.name} is {value!r}, which is not done here: {variable.why}")
    if given.get("attention") in KERNELS_OF_TGI:
        said = _said(BY_NAME["attention"], given, sources)
        raise ConfigError(f"{said}, kernels of TGI's; leave it out and the first that prove right here are taken")
    if not given.get("api_key", "not given").strip() or environment.get("API_KEY", "not set").strip() == "":
        # A secret that failed to arrive must not open the server to all.
        raise ConfigError("--api-key (API_KEY) is empty; leave it out to serve without a key")
    if not given.get("model_id"):
        raise ConfigError("--model-id (MODEL_ID) is missing: a model folder, or an id on the Hugging Face hub")


def _needless(given: Mapping[str, Any], sources: Mapping[str, str], environment: Mapping[str, str]) -> Iterator[str]:
    for flag in _those_given("needless", given):
        yield f"{_said(flag, given, sources)}; nothing to do: {flag.why}"
    for variable in _variables_given("needless", environment):
        yield f"{variable.name} is {environment[variable.name]!r}; nothing to do: {variable.why}"


def _those_given(verdict: str, given: Mapping[str, Any]) -> Iterator[Flag]:
    return (flag for flag in FLAGS if flag.verdict == verdict and flag.parameter in given)


def _variables_given(verdict: str, environment: Mapping[str, str]) -> Iterator[Variable]:
    return (variable for variable in VARIABLES if variable.verdict == verdict and environment.get(variable.name))


def _said(flag: Flag, given: Mapping[str, Any], sources: Mapping[str, str]) -> str:
    value = "(secret)" if flag.is_secret else repr(given[flag.parameter])
    return f"--{flag.name} is {value} ({sources[flag.parameter]})"


def describe(values: Mapping[str, Any], sources: Mapping[str, str]) -> str:
    """Everything that was given, and where; secrets are not shown."""
    return ", ".join(_said(flag, values, sources) for flag in FLAGS if flag.parameter in sources)


# --- Combinations -------------------------------------------------------------------------------------------


def _refuse_contradictions(given: Mapping[str, Any]) -> None:
    """What can be known before the model is."""
    if "max_input_tokens" in given and "max_input_length" in given:
        raise ConfigError(
            "--max-input-tokens and --max-input-length are both given; they mean the same, keep the first"
        )
    longest_input = given.get("max_input_tokens", given.get("max_input_length"))
    total, cache = given.get("max_total_tokens"), given.get("max_batch_total_tokens")
    if longest_input is not None and total is not None and longest_input >= total:
        raise ConfigError(
            f"--max-input-tokens is {longest_input}, but --max-total-tokens is {total}; it must be less, to leave room"
        )
    if total is not None and cache is not None and total > cache:
        raise ConfigError(
            f"--max-total-tokens is {total}, but --max-batch-total-tokens gives the KV cache {cache}, and one request"
            f" must fit it; lower the first or raise the second"
        )
    _refuse_shards(given.get("sharded"), given.get("num_shard"))
    _refuse_adapters(given)


def _refuse_shards(sharded: bool | None, num_shard: int | None) -> None:
    """TGI's rules, for the one device that there is; unset, TGI takes all visible devices and we take the best one."""
    way_out = "one device serves a model here; start a server on each with --device-index, and balance between them"
    if num_shard is not None and num_shard > 1:
        raise ConfigError(f"--num-shard is {num_shard}, which is not done here: {way_out}")
    if sharded and num_shard is not None:
        raise ConfigError(f"--sharded is true, but --num-shard is {num_shard}; drop --sharded")
    if sharded:
        raise ConfigError(f"--sharded is true, which is not done here: {way_out}")


def _refuse_adapters(given: Mapping[str, Any]) -> None:
    """Limits of adapters that there will be none of, or more."""
    sources, most = given.get("lora_adapters") or (), given.get("max_loras")
    if not sources and not given.get("allow_runtime_lora"):
        for name in ("max_loras", "max_lora_rank"):
            if name in given:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is {given[name]}, but there will be no adapters: name some with"
                    " --lora-adapters, or let clients load them with --allow-runtime-lora"
                )
    if most is not None and len(sources) > most:
        raise ConfigError(
            f"--lora-adapters names {len(sources)} adapters, but --max-loras is {most}; raise it to {len(sources)}"
        )
