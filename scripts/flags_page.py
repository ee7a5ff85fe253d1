"""Write docs/flags.md from the tables in tokenplane_api/flags.py.

python scripts/flags_page.py            write the page
python scripts/flags_page.py --check    say whether it is what it should be
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pages import table, write_or_check

from tokenplane_api.flags import FLAGS, GROUPS, VARIABLES, Flag

HEAD = """# Flags

`tokenplane serve` and `text-generation-launcher` are the same command. Each option can be given on the command line, by
its environment variable, or in a file named with `--config` (TOML or YAML, by the option's name); the command line wins
over the environment, the environment over the file. An empty variable counts as none. `tokenplane plan` takes those
options that decide about memory.

Options with a TGI default are TGI's, with TGI's meaning. None is passed over in silence: what has nothing left to do
here is accepted and the log says why, what would not happen is refused with what to do instead.

This page is made by `scripts/flags_page.py` from `api/tokenplane_api/flags.py`.
"""


def page() -> str:
    return "\n".join([HEAD, *_options(), *_others("needless"), *_others("refused"), *_variables()])


def _options() -> Iterator[str]:
    for group in GROUPS:
        yield f"## {group}\n"
        rows = ((_name(flag), _code(flag.environment), flag.help, _default(flag), _tgi(flag)) for flag in _of(group))
        yield from table(("Option", "Variable", "Meaning", "Default", "TGI's default"), rows)


def _others(verdict: str) -> Iterator[str]:
    titles = {"needless": "Accepted, with nothing left to do", "refused": "Refused"}
    yield f"## {titles[verdict]}\n"
    chosen = [flag for flag in FLAGS if flag.verdict == verdict]
    rows = [(_name(flag), _code(flag.environment), _sentence(flag.why), _tgi(flag)) for flag in chosen]
    yield from table(("Option", "Variable", "Why" if verdict == "needless" else "Instead", "TGI's default"), rows)


def _variables() -> Iterator[str]:
    yield "## Variables without an option\n"
    rows = (
        (_code([v.name]), v.verdict, _sentence(v.why) + (f" Accepted: {_code(v.idle)}." if v.idle else ""))
        for v in VARIABLES
    )
    yield from table(("Variable", "What becomes of it", "Meaning, reason or what to do instead"), rows)


def _of(group: str) -> Iterator[Flag]:
    return (flag for flag in FLAGS if flag.group == group)


def _name(flag: Flag) -> str:
    return _code([f"--{flag.name}", *flag.names])


def _code(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _default(flag: Flag) -> str:
    if flag.unset or flag.default is None:
        return flag.unset
    return str(flag.default).lower() if flag.is_switch else str(flag.default)


def _tgi(flag: Flag) -> str:
    return "" if flag.tgi is None else flag.tgi


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


if __name__ == "__main__":
    write_or_check("flags.md", page())
