"""The specdec command: parse, call, print."""

import sys
from typing import Any

import click

from specdec.cli.generate import generate
from specdec.errors import InvalidArgumentError, SpecDecError


class _Group(click.Group):
    """Turns every error that a caller can cause into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InvalidArgumentError as error:
            _fail(str(error), 2)
        except SpecDecError as error:
            _fail(str(error), 1)


def _fail(message: str, code: int) -> None:
    click.echo("specdec: " + " ".join(message.split()), err=True)
    sys.exit(code)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="specdec")
def main() -> None:
    """Lossless speculative decoding for Hugging Face models.

    Exit codes: 0 done, 1 the run failed, 2 the command line was wrong, 130 interrupted.
    """


main.add_command(generate)

if __name__ == "__main__":
    main()
