"""From a command line to checked `Settings`: preset, then TOML file, then dotted options. Imports no torch.

tyro reads the options and writes `--help`; pydantic checks the values, and what it finds is said in one sentence.
"""

import contextlib
import dataclasses
import difflib
import functools
import io
import itertools
import os
import sys
import tomllib
import typing
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import tyro
from pydantic import ValidationError

from .config import Section, Settings, check, is_used
from .errors import RankError, UserError

S = TypeVar("S", bound=Settings)

PRESETS = resources.files(__package__) / "presets"


def run_script(main: Callable[[Sequence[str]], None]) -> None:
    """Run a script's `main(argv)`; a `UserError` becomes one line on stderr and exit code 2."""
    # Read when torch is loaded. Threads that spin at a barrier while another process has their core cost tenfold.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        main(sys.argv[1:])
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, RankError):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if is_first_rank():
            print("interrupted before there was anything to save", file=sys.stderr)
        sys.exit(130)


def is_first_rank() -> bool:
    """Whether this process speaks for the run; known before any process group exists."""
    return os.environ.get("RANK", "0") == "0"


def preset_names() -> list[str]:
    return sorted(entry.name.removesuffix(".toml") for entry in PRESETS.iterdir() if entry.name.endswith(".toml"))


def parse(argv: Sequence[str], *, description: str) -> Settings:
    """Read settings from `argv` and check them; raises as `parse_as` does."""
    return parse_as(Settings, argv, description=description, check=check)


def parse_as(kind: type[S], argv: Sequence[str], *, description: str, check: Callable[[S], None]) -> S:
    """Read settings, and what a script of its own adds to them, from `argv`.

    kind:        `Settings`, or a class with more options of a script's own
    description: the first lines of `--help`
    check:       called with the settings, to raise what is wrong with them

    Raises:
        UserError: for a value, key or combination that cannot be used.
        SystemExit: code 0 after `--help`.
    """
    argv = [word for word in argv if not word.startswith(("--local_rank", "--local-rank"))]  # the launcher's own
    refuse_unknown(argv, kind)
    refuse_contradictions(argv)
    preset = option(argv, "preset") or Settings().preset
    config = option(argv, "config")
    values = load_preset(preset)
    if config is not None:
        merge(values, load_toml(Path(config)))
    values |= {"preset": preset, "config": config}
    values.setdefault("output_dir", f"output/{preset}")
    default = validate(values, kind)

    try:
        given = read_options(argv, default, description)
    except SystemExit as end:
        if end.code:
            refuse_unreadable(argv, default)
        raise
    settings = validate(dataclasses.asdict(given), kind)
    if settings.tokenizer.path is not None:
        refuse_useless_beside_tokenizer(argv)
    check(settings)
    return settings


def read_options(argv: Sequence[str], default: Settings, description: str = "") -> Any:
    """`default` with the options put over it, unchecked; `SystemExit` after `--help` or for what cannot be read."""
    with contextlib.redirect_stderr(io.StringIO()):  # tyro explains in a box; `refuse_unreadable` does in a sentence
        return tyro.cli(
            mirror(type(default)),
            args=argv,
            default=mirrored(default),
            description=description,
            use_underscores=True,
            console_outputs=is_first_rank(),
        )


def option(argv: Sequence[str], name: str) -> str | None:
    """Value of `--name VALUE` or `--name=VALUE`, read before the preset is known."""
    for i, word in enumerate(argv):
        if word == f"--{name}":
            return argv[i + 1] if i + 1 < len(argv) else None
        if word.startswith(f"--{name}="):
            return word.partition("=")[2]
    return None


def refuse_unknown(argv: Sequence[str], kind: type[Settings] = Settings) -> None:
    """Raise `UserError` for an option that is no setting, naming the nearest one."""
    names = field_names(kind)
    opposites = [opposite(name) for name in names]
    for word in argv:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and name not in ("help", *names, *opposites):
            sections_left_out = [known for known in names if known.rpartition(".")[2] == name]
            close = sections_left_out or difflib.get_close_matches(name, names, n=1, cutoff=0.6)
            hint = f"did you mean --{' or --'.join(close)}?" if close else "--help lists the options."
            raise UserError(f"there is no option --{name}; {hint}")


def refuse_contradictions(argv: Sequence[str]) -> None:
    """Raise `UserError` when one option is given twice with two values."""
    seen: dict[str, list[str]] = {}
    for name, values in split_options(argv):
        if seen.setdefault(name, values) != values:
            raise UserError(f"--{name} is given twice, as {' '.join(seen[name])} and {' '.join(values)}; give it once.")


def refuse_unreadable(argv: Sequence[str], default: Settings) -> NoReturn:
    """Raise `UserError` for the first option that cannot be read, with what it takes."""
    if argv and not argv[0].startswith("--"):
        raise UserError(f"{argv[0]!r} belongs to no option; options look like --optim.lr 1e-3, --help lists them.")
    for name, values in split_options(argv):
        try:
            read_options([f"--{name}", *values], default)
        except SystemExit:
            given = f"--{name} {' '.join(values)}".strip()
            raise UserError(f"{given} cannot be read: --{name} takes {takes(name, type(default))}.") from None
    raise UserError("the options cannot be read together; --help lists them.")


def refuse_useless_beside_tokenizer(argv: Sequence[str]) -> None:
    """Raise `UserError` for an option about training a tokenizer when a trained one is used."""
    for name, _ in split_options(argv):
        if name.startswith("tokenizer.") and name != "tokenizer.path":
            raise UserError(
                f"--{name} is for training a tokenizer and tokenizer.path gives a trained one; leave one of them out."
            )


def split_options(argv: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each option's name, with underscores and without `--`, and the words that belong to it."""
    starts = [i for i, word in enumerate(argv) if word.startswith("--")]
    for start, end in itertools.pairwise([*starts, len(argv)]):
        name, equals, value = argv[start].partition("=")
        yield name.removeprefix("--").replace("-", "_"), [value] * bool(equals) + list(argv[start + 1 : end])


def annotation_of(name: str, kind: type[Settings]) -> Any:
    """The type of a setting by its dotted name, or by that of its `no_` form."""
    section: type[Section] = kind
    *parents, last = name.split(".")
    for parent in parents:
        section = section.model_fields[parent].annotation  # type: ignore[assignment]
    return section.model_fields[last if last in section.model_fields else last.removeprefix("no_")].annotation


def takes(name: str, kind: type[Settings]) -> str:
    """What the option of this name takes, in words."""
    annotation = annotation_of(name, kind)
    if annotation is not bool:
        return allowed(annotation)
    on = name if name in field_names(kind) else name.replace(".no_", ".").removeprefix("no_")
    return f"no value; --{on} alone turns it on, --{opposite(on)} off"


def opposite(name: str) -> str:
    """`train.no_compile` for `train.compile`: the option that turns a setting off."""
    section, dot, field = name.rpartition(".")
    return f"{section}{dot}no_{field}"


def allowed(annotation: Any) -> str:
    """What an option of this type takes, in words."""
    if typing.get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(annotation)))
    if typing.get_origin(annotation) is tuple:
        return "two numbers"
    if typing.get_origin(annotation) in (UnionType, typing.Union):
        kind, _ = typing.get_args(annotation)
        return f"{allowed(kind)} or None"
    return {int: "a whole number", float: "a number"}.get(annotation, "one word")


def load_preset(name: str) -> dict[str, Any]:
    """Values of a recipe in `engine/presets/`."""
    if name not in preset_names():
        raise UserError(f"there is no preset {name!r}{did_you_mean(name, preset_names())}")
    return tomllib.loads((PRESETS / f"{name}.toml").read_text())


def load_toml(path: Path) -> dict[str, Any]:
    """Values of a user's TOML file."""
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(f"config = {path} cannot be read ({error.strerror}); give an existing TOML file.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"config = {path} is not valid TOML: {error}.") from None
    for key in ("preset", "config"):
        if key in values:
            raise UserError(f"{path} sets {key}, which only the command line can; pass --{key} {values[key]} there.")
    return values


def merge(values: dict[str, Any], changes: dict[str, Any]) -> None:
    """Put `changes` over `values`, section by section, in place."""
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            values[key] = values[key] | value
        else:
            values[key] = value


def validate(values: dict[str, Any], kind: type[S]) -> S:
    """Build settings; the first value that does not fit is named in a `UserError`."""
    try:
        return kind.model_validate(values)
    except ValidationError as errors:
        first = errors.errors(include_url=False)[0]
        path = [str(part) for part in first["loc"]]
        name = ".".join(path)
        if first["type"] == "extra_forbidden":
            known = field_names(kind)
            raise UserError(f"there is no setting {name!r}{did_you_mean(name, known)}") from None
        what = first["msg"].removeprefix("Input ").removeprefix("Value error, ")
        if first["type"] in ("bool_type", "bool_parsing"):
            what = "has to be true or false, without quotes"
        raise UserError(f"{name} = {first['input']!r} is not allowed: it {what}.") from None


def options_of(settings: Settings) -> list[str]:
    """The options that lead to these settings, without `--resume` and `--overwrite`."""
    default = validate(load_preset(settings.preset) | {"preset": settings.preset}, Settings)
    argv = ["--preset", settings.preset, "--output_dir", str(settings.output_dir)]
    for name in field_names(Settings):
        if name in ("preset", "config", "output_dir", "resume", "overwrite") or not is_used(name, settings):
            continue
        value: Any = functools.reduce(getattr, name.split("."), settings)
        usual: Any = functools.reduce(getattr, name.split("."), default)
        if value == usual:
            continue
        if isinstance(value, bool):
            argv.append(f"--{name if value else opposite(name)}")
        else:
            argv += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    return argv


def field_names(section: type[Section], prefix: str = "") -> list[str]:
    """All dotted names of a section's settings."""
    names = []
    for name, field in section.model_fields.items():
        if is_section(field.annotation):
            names += field_names(field.annotation, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            names.append(f"{prefix}{name}")
    return names


def did_you_mean(given: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}."


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


@functools.cache
def mirror(section: type[Section]) -> type:
    """A dataclass with the section's fields, for tyro to fill unchecked: the checks, and their wording, are ours."""
    fields = []
    for name, field in section.model_fields.items():
        annotation: Any = field.annotation
        kind = mirror(annotation) if is_section(annotation) else annotation
        fields.append((name, Annotated[kind, tyro.conf.arg(help=(field.description or "").replace("`", ""))]))
    view = dataclasses.make_dataclass(section.__name__, fields, frozen=True)
    view.__doc__ = section.__doc__
    return view


def mirrored(section: Section) -> Any:
    """`section` as an instance of its mirror."""
    values = {name: getattr(section, name) for name in type(section).model_fields}
    return mirror(type(section))(
        **{name: mirrored(value) if isinstance(value, Section) else value for name, value in values.items()}
    )
