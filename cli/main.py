"""The specdec command: parse, call, print."""

import io
import os
import sys
import warnings
from typing import Any, NoReturn

import click
import torch

from specdec.cli.bench import bench
from specdec.cli.eval import evaluate
from specdec.cli.generate import generate
from specdec.cli.index import index
from specdec.cli.info import info
from specdec.cli.report import report
from specdec.cli.tune import tune
from specdec.cli.verify import verify
from specdec.errors import InvalidArgumentError, SpecDecError


class _Group(click.Group):
    """Turns every error that a caller can cause into one line and an exit code."""

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # what the terminal cannot show
        before, warnings.formatwarning = warnings.formatwarning, _warning_line
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(error.exit_code)
        except click.ClickException as error:
            _fail(error.format_message(), error.exit_code)
        except click.Abort:
            sys.exit(130)
        except InvalidArgumentError as error:
            _fail(str(error), 2)
        except SpecDecError as error:
            _fail(str(error), 1)
        except OSError as error:
            named = [str(error.filename)] if error.filename is not None else []
            _fail(": ".join([*named, error.strerror or str(error)]), 1)
        except (MemoryError, torch.OutOfMemoryError) as error:
            _fail(f"out of memory: {error}", 1)
        finally:
            warnings.formatwarning = before
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # the reader has gone (| head): nothing is left to say, not even at interpreter exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0


def _one_line(message: str) -> str:
    return "specdec: " + " ".join(message.split())


def _warning_line(message: Warning | str, *_: Any, **__: Any) -> str:
    return _one_line(f"warning: {message}") + "\n"


def _fail(message: str, code: int) -> NoReturn:
    click.echo(_one_line(message), err=True)
    sys.exit(code)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="specdec")
def main() -> None:
    """Lossless speculative decoding for Hugging Face models.

    Exit codes: 0 done, 1 the run failed, 2 the command line was wrong, 130 interrupted.
    """


main.add_command(generate)
main.add_command(bench)
main.add_command(evaluate)
main.add_command(report)
main.add_command(tune)
main.add_command(verify)
main.add_command(index)
main.add_command(info)

if __name__ == "__main__":
    main()
