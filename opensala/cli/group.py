"""What the command line's groups share."""

from typing import Any

from typer.core import TyperGroup


class RunUnlessNamed(TyperGroup):
    """`opensala GROUP THING ...` beside `opensala GROUP COMMAND ...`: a first word that names no command goes
    to `run`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = args and args[0] in self.commands
        return super().parse_args(ctx, args if named else ["run", *args])
