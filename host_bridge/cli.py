"""The `taploom` command.

Command groups are imported when they are invoked, those of other packages (entry points of the group
`taploom.commands`) too: start-up time is what a script that calls `taploom` a hundred times feels.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import click

from taploom import __version__

ENTRY_POINTS = "taploom.commands"

# Name -> (module, attribute, help line): the line is here so that `taploom --help` imports none of them.
_COMMANDS = {
    "network": ("host_bridge.commands.network", "network", "Networks, and which guests are on them."),
    "guest": ("host_bridge.commands.guest", "guest", "Guests: VMs with an agent in them."),
    "lb": ("host_bridge.commands.lb", "lb", "Load balancers: one address in front of several guests."),
    "policy": ("host_bridge.commands.policy", "policy", "Which connections may pass."),
    "qos": ("host_bridge.commands.qos", "qos", "How much guests may send and receive."),
    "capture": ("host_bridge.commands.capture", "capture", "The packets of a guest, live."),
    "mirror": ("host_bridge.commands.mirror", "mirror", "Copies of a guest's packets for another guest."),
    "status": ("host_bridge.commands.status", "status", "How every component and link is."),
    "trace": ("host_bridge.commands.trace", "trace", "Whether and why a connection would pass."),
    "topology": ("host_bridge.commands.topology", "topology", "The fabric as a tree, a page or a drawing."),
    "top": ("host_bridge.commands.top", "top", "What every endpoint carries, live."),
    "kernel": ("host_bridge.commands.kernel", "kernel", "Whether a Linux kernel has what guests and helper need."),
}
# Help lines of the groups that ship with taploom; others are named after the package that they come from.
_KNOWN_HELP = {"lab": "Run the whole fabric on this machine."}


class _LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*_COMMANDS, *sorted(_entry_points().keys() - _COMMANDS.keys())]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _COMMANDS:
            module, attribute, _ = _COMMANDS[cmd_name]
            command = getattr(importlib.import_module(module), attribute)
        else:
            target = _entry_points().get(cmd_name)
            if target is None:
                return None
            module, _, attribute = target.partition(":")
            try:
                command = getattr(importlib.import_module(module), attribute)
            except (ImportError, AttributeError) as error:
                raise click.ClickException(f"command {cmd_name} cannot be loaded: {error}") from error
        if not isinstance(command, click.Command):
            raise click.ClickException(f"command {cmd_name} is not a click command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, _COMMANDS[name][2]) for name in _COMMANDS]
        rows += [
            (name, _KNOWN_HELP.get(name, f"From {target.partition(':')[0]}."))
            for name, target in sorted(_entry_points().items())
            if name not in _COMMANDS
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _entry_points() -> dict[str, str]:
    from importlib.metadata import entry_points

    return {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Shell completion:
  bash: eval "$(_TAPLOOM_COMPLETE=bash_source taploom)"
  zsh:  eval "$(_TAPLOOM_COMPLETE=zsh_source taploom)"
  fish: _TAPLOOM_COMPLETE=fish_source taploom | source
""",
)
@click.option("--bridge", metavar="ADDRESS", help="Where the bridge is; default: $TAPLOOM_BRIDGE or its usual places.")
@click.option("--lab", metavar="NAME", help="Use this lab's bridge; default: $TAPLOOM_LAB.")
@click.version_option(__version__, prog_name="taploom")
def cli(bridge: str | None, lab: str | None) -> None:
    """Docker's networks for container VMs, attached while they run.

    \b
    Example:
        taploom network create app
        taploom network connect app web
        taploom network connect app db --alias postgres
        taploom status
    """


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command and exits: 0 done, 1 failed, 2 wrong usage. Errors are one line on standard error."""
    try:
        code = cli.main(args=None if argv is None else list(argv), prog_name="taploom", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx is not None else "taploom"
        click.echo(f"taploom: {_one_line(error)} See '{path} --help'.", err=True)
        sys.exit(2)
    except click.ClickException as error:
        click.echo(f"taploom: {_one_line(error)}", err=True)
        sys.exit(1)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:
        # `taploom status --watch | head`: nobody reads any more. Nothing is to be flushed there at exit either.
        sys.stdout = None
        sys.exit(1)


def _one_line(error: click.ClickException) -> str:
    return " ".join(error.format_message().split())


if __name__ == "__main__":
    main()
