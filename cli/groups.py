"""Groups of commands, whose errors name the commands that there are."""

from __future__ import annotations

import click

from refimpl.errors import unknown


class Commands(click.Group):
    """A group that suggests the nearest of its commands for an unknown one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = self.list_commands(ctx)
        if args and args[0] not in known and not args[0].startswith("-"):
            raise unknown("command", args[0], known)
        return super().resolve_command(ctx, args)
