"""Sub-commands of ``jaxrlhf`` that tell what there is: config keys, the schema, metrics, configs, starter configs.

Nothing heavy is imported before a command runs."""

import json
import shutil
import textwrap
from pathlib import Path
from typing import Annotated

import typer

config = typer.Typer(help="Show config keys, presets and the JSON schema.", no_args_is_help=True)
configs = typer.Typer(
    help="List the configs and presets that come with the package, and copy configs.", invoke_without_command=True
)


@config.command()
def keys(
    which: Annotated[
        str, typer.Argument(metavar="[WHICH]", help="An algorithm, a section, a dotted prefix or a key. Default: all.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON array.")] = False,
) -> None:
    """List config keys with type, default and meaning: all, an algorithm's (grpo), or those below a prefix."""
    from jaxrlhf.config.record import Config
    from jaxrlhf.config.reference import keys_in, keys_of, select
    from jaxrlhf.config.roles import find_algorithm

    outside = ":" in which  # package.module:NAME
    chosen = [*keys_in(find_algorithm(which).config, "algorithm", which)] if outside else select(keys_of(Config), which)
    if as_json:
        typer.echo(json.dumps([key._asdict() for key in chosen]))
        return
    for key in chosen:
        of = f" [{key.algorithm}]" if key.algorithm else ""
        default = "required" if key.default == "required" else f"default {key.default}"
        tell(f"{key.path}{of}: {key.type.replace('`', '')}, {default}", key.meaning)
    if any("<role>" in key.path for key in chosen):
        tell("<role>: policy, reference, reward or value, as the algorithm needs; under optimizer also default")
    if not chosen or chosen[0].algorithm == which:
        own = "" if chosen else f"{which} has no keys of its own. "
        tell(f"{own}The keys of every run, whatever its algorithm: jaxrlhf config keys")


@config.command()
def preset(
    name: Annotated[str, typer.Argument(help="A preset: trl-grpo, verl-grpo, openrlhf-ppo, tunix-grpo, dapo, ...")],
) -> None:
    """Print the values that `preset: NAME` stands for, as YAML."""
    import yaml

    from jaxrlhf.config.presets import PRESETS
    from jaxrlhf.errors import ConfigError, nearest

    if name not in PRESETS:
        raise ConfigError(f"config preset: {name}: unknown preset; {nearest(name, [*PRESETS])}")
    found = PRESETS[name]
    typer.echo(f"# {found.about[0].upper()}{found.about[1:]}: {found.source}")
    typer.echo(yaml.safe_dump(found.tree, sort_keys=False), nl=False)


@config.command()
def schema() -> None:
    """Print the JSON schema of configs, for editors.

    Save it (jaxrlhf config schema > jaxrlhf.schema.json) and begin a config with the line
    # yaml-language-server: $schema=jaxrlhf.schema.json
    """
    from jaxrlhf.config.schema import schema as make

    typer.echo(json.dumps(make(), indent=1))


def metrics(
    which: Annotated[str, typer.Argument(metavar="[WHICH]", help="Part of a metric name. Default: all.")] = "",
) -> None:
    """List the metrics that runs write, with unit and meaning."""
    from jaxrlhf.errors import ConfigError, nearest
    from jaxrlhf.log.metric_names import HELD_OUT, METRICS, find_metric

    exact = find_metric(which)
    chosen = [exact] if exact else [row for row in METRICS if which.removeprefix(HELD_OUT) in row.name]
    if not chosen:
        raise ConfigError(
            f"metrics: {which}: no such metric; {nearest(which, [row.name for row in METRICS], 'see jaxrlhf metrics')}"
        )
    for row in chosen:
        tell(row.name if row.unit == "-" else f"{row.name} ({row.unit})", row.meaning)


def init(
    method: Annotated[
        str,
        typer.Argument(
            metavar="[METHOD]", help="A method: sft, dpo, ppo, ilql, ...", autocompletion=lambda: [*starters()]
        ),
    ] = "",
) -> None:
    """Print a commented starter config (jaxrlhf init dpo > dpo.yaml); without a method, list the methods."""
    from jaxrlhf.errors import ConfigError, nearest

    known = starters()
    if not method:
        for name, path in known.items():
            tell(name, first_comment(path).partition(" Replace")[0])
        tell("jaxrlhf init METHOD > METHOD.yaml writes a config to begin with.")
        return
    if method not in known:
        raise ConfigError(f"init: {method}: no such method; {nearest(method, [*known])}")
    typer.echo(known[method].read_text(encoding="utf-8"), nl=False)


def starters() -> dict[str, Path]:
    """The config that each method begins with."""
    found = {name.partition("/"): path for name, path in find_configs().items()}
    return {method: path for (folder, _, method), path in found.items() if folder == "starters"}


@configs.callback()
def list_configs(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        from jaxrlhf.config.presets import PRESETS

        for name, path in find_configs().items():
            tell(name, first_comment(path))
        for name, preset in PRESETS.items():
            tell(f"preset: {name}", f"{preset.about} ({preset.source})")
        tell("jaxrlhf configs copy NAME FOLDER copies one (tiny/dpo) or a folder of them (tiny).")
        tell("jaxrlhf config preset NAME prints the values that preset: NAME stands for.")


@configs.command()
def copy(
    name: Annotated[
        str,
        typer.Argument(
            help="A config (tiny/dpo) or a folder of them (tiny).", autocompletion=lambda: [*find_configs()]
        ),
    ],
    to: Annotated[str, typer.Argument(help="The folder to write to.")] = ".",
) -> None:
    """Copy configs; existing files are kept."""
    from jaxrlhf.errors import ConfigError, nearest

    found, wanted = find_configs(), name.removesuffix(".yaml").strip("/")
    chosen = {key: path for key, path in found.items() if key == wanted or key.startswith(f"{wanted}/")}
    if not chosen:
        choices = [*found, *{key.rpartition("/")[0] for key in found}]
        raise ConfigError(f"configs copy: {name}: no such config; {nearest(wanted, choices, 'see jaxrlhf configs')}")
    targets = [(path, Path(to) / path.name) for path in chosen.values()]
    if there := [str(target) for _, target in targets if target.exists()]:
        raise ConfigError(f"configs copy: {', '.join(there)}: exists already; expected another folder")
    try:
        Path(to).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"configs copy: {to}: {error.strerror}; expected a folder") from None
    for path, target in targets:
        shutil.copyfile(path, target)
        typer.echo(target)


def find_configs() -> dict[str, Path]:
    """The configs that came with the package, by name ("tiny/dpo"): in it where it was installed from a wheel, beside
    it in a checkout."""
    package = Path(__file__).parent.parent
    root = next(folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir())
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def first_comment(path: Path) -> str:
    """The comment that a config begins with."""
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def tell(head: str, meaning: str = "") -> None:
    """A line, and its meaning indented below it, within the terminal's width."""
    width = min(shutil.get_terminal_size().columns, 100)
    typer.echo("\n".join(textwrap.wrap(head, width, subsequent_indent="    ", break_on_hyphens=False)))
    if meaning:
        typer.echo(textwrap.indent("\n".join(textwrap.wrap(meaning, width - 4, break_on_hyphens=False)), "    "))
