"""The table of flags as click sees it: parameters, a help text in groups, and the config file.

Precedence is click's own: option, then environment, then file (click's default_map), then default. Values of a file
are checked like those of an option.
"""

from __future__ import annotations

import difflib
import inspect
import os
import textwrap
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import yaml  # type: ignore[import-untyped]
from click.core import ParameterSource

from .flags import BY_NAME, GROUPS, PATH, Flag

CONFIG_VARIABLE = "TOKENPLANE_CONFIG"


class GroupedCommand(click.Command):
    """A command whose help lists its options under headings, and never breaks a name at its hyphens."""

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _write(inspect.cleandoc(self.help or ""), formatter)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _write(self.epilog or "", formatter)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {group: [] for group in GROUPS}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                flag = BY_NAME.get((parameter.name or "").replace("_", "-"))
                groups.setdefault(flag.group if flag else "Other", []).append(record)
        for heading, records in groups.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


def _write(text: str, formatter: click.HelpFormatter) -> None:
    for paragraph in filter(None, text.split("\n\n")):
        lines = textwrap.wrap(paragraph, formatter.width - 2, break_on_hyphens=False)
        formatter.write("\n" + "".join(f"  {line}\n" for line in lines))


class FlagOption(click.Option):
    """An option whose help is the table's and nothing more, and whose errors say where the value came from."""

    def get_help_extra(self, ctx: click.Context) -> Any:
        return {}

    def get_error_hint(self, ctx: click.Context | None) -> str:
        where = source_of(self, ctx, "the config file") if ctx else None
        return f"'--{(self.name or '').replace('_', '-')}'" + (f" ({where})" if where else "")


def option(flag: Flag) -> click.Option:
    """A flag as a click option. Absent means None, so that defaults stand in one place: the dataclasses."""
    spelling = f"--{flag.name}"
    if flag.is_switch:
        spelling = "/".join((spelling, *flag.names))
        kind: dict[str, Any] = {"is_flag": True, "default": None}
    else:
        kind = {"type": flag.type, "multiple": flag.is_repeated, "default": None, "metavar": _metavar(flag)}
    return FlagOption(
        [spelling, *(() if flag.is_switch else flag.names), flag.parameter],
        envvar=list(flag.environment),
        help=f"{flag.help} {_brackets(flag)}".rstrip(),
        hidden=flag.verdict != "honoured",
        callback=_same_everywhere,
        **kind,
    )


def sources(context: click.Context, config: Path | None) -> dict[str, str]:
    """For each parameter that was given, where: `command line`, a variable's name, or the config file."""
    found = {p.name or "": source_of(p, context, str(config)) for p in context.command.params}
    return {name: source for name, source in found.items() if source is not None}


def source_of(parameter: click.Parameter, context: click.Context, file: str) -> str | None:
    match context.get_parameter_source(parameter.name or ""):
        case ParameterSource.COMMANDLINE:
            return "command line"
        case ParameterSource.ENVIRONMENT:
            return next((name for name in parameter.envvar or () if os.environ.get(name)), "environment")
        case ParameterSource.DEFAULT_MAP:
            return file
        case _:
            return None


METAVARS = {
    "integer range": "N",
    "float range": "F",
    "float": "F",
    "path": "PATH",
    "list": "N,N,..",
    "boolean": "BOOL",
    "adapters": "LIST",
}


def _metavar(flag: Flag) -> str | None:
    """What stands for the value in the help; None: the choices, if they are few."""
    if not isinstance(flag.type, click.ParamType):
        return "TEXT"
    if isinstance(flag.type, click.Choice) and len(flag.type.choices) > 4:
        return "KIND"
    return METAVARS.get(flag.type.name)


def _brackets(flag: Flag) -> str:
    """What a reader cannot guess: the default, and a variable that is not the name in capitals."""
    parts = []
    if flag.environment[0] != flag.parameter.upper():
        parts.append(flag.environment[0])
    if flag.unset:
        parts.append(f"default: {flag.unset}")
    elif flag.is_switch:
        parts += ["default: on"] if flag.default else []
    elif flag.default is not None:
        parts.append(f"default: {flag.default:g}" if isinstance(flag.default, float) else f"default: {flag.default}")
    return f"[{'; '.join(parts)}]" if parts else ""


def _same_everywhere(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Refuse several variables for one option that say different things: one of them would be ignored."""
    source = context.get_parameter_source(parameter.name or "")
    if source is ParameterSource.ENVIRONMENT:
        given = {name: os.environ[name] for name in parameter.envvar or () if os.environ.get(name)}
        if len(set(given.values())) > 1:
            said = " and ".join(f"{name}={text}" for name, text in given.items())
            raise click.BadParameter(f"the environment contradicts itself: {said}", context, parameter)
    return value


# --- The config file ----------------------------------------------------------------------------------------


def config_option() -> click.Option:
    """--config, which is read before all other options."""

    def load(context: click.Context, _: click.Parameter, path: Path | None) -> Path | None:
        if path is not None:
            context.default_map = read_config(path)
        return path

    return click.Option(
        ["--config"],
        type=PATH,
        envvar=CONFIG_VARIABLE,
        is_eager=True,
        callback=load,
        metavar="PATH",
        help=f"File with options (.toml, .yaml); command line and environment win. [{CONFIG_VARIABLE}]",
    )


def read_config(path: Path) -> dict[str, Any]:
    """Options from a TOML or YAML file, by parameter name, as the strings and lists a command line would hold.

    Raises:
        UsageError: it cannot be read, holds an unknown name, or a value that is no option's; names file and key.
    """
    entries: dict[str, Any] = {}
    for key, value in _parse(path).items():
        name = str(key).replace("_", "-")
        flag = BY_NAME.get(name)
        if flag is None:
            raise click.UsageError(f"{path}: {key!r} is no option of `tokenplane serve`{_close_to(name)}")
        if flag.parameter in entries:
            raise click.UsageError(f"{path}: {name!r} is given twice")
        if value is not None:
            entries[flag.parameter] = _as_typed(path, flag, value)
    return entries


def _parse(path: Path) -> Mapping[Any, Any]:
    suffix = path.suffix.lower()
    try:
        text = path.expanduser().read_text(encoding="utf-8")
        if suffix == ".toml":
            parsed = tomllib.loads(text)
        elif suffix in (".yaml", ".yml"):
            parsed = yaml.safe_load(text) or {}
        else:
            raise click.UsageError(f"--config is {path}; its name must end in .toml, .yaml or .yml")
    except OSError as error:
        raise click.UsageError(f"--config is {path}, which cannot be read: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise click.UsageError(f"{path} is not valid {suffix.strip('.').upper()}: {error}") from error
    if not isinstance(parsed, dict):
        raise click.UsageError(f"{path} must hold options by name, such as port: 8080")
    return parsed


def _as_typed(path: Path, flag: Flag, value: Any) -> Any:
    if isinstance(value, list):
        texts = [_scalar(path, flag, item) for item in value]
        return texts if flag.is_repeated else ",".join(texts)
    text = _scalar(path, flag, value)
    return [text] if flag.is_repeated else text


def _scalar(path: Path, flag: Flag, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        return str(value)
    raise click.UsageError(f"{path}: {flag.name!r} is {value!r}; it must be a text, a number, true or false, or a list")


def _close_to(name: str) -> str:
    close = difflib.get_close_matches(name, list(BY_NAME), 1)
    return f"; did you mean {close[0]!r}?" if close else "; `tokenplane serve --help` lists them"
