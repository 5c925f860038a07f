"""The command line: finds the command's file, runs it, turns errors into one line and an exit code.

Exit codes: 0 done, 1 failed, 2 unusable input. Deliberately no argparse wall: every command takes Hydra overrides.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import Final

from qwenimg_dist.commands.inputs import describe_os_error
from qwenimg_dist.compose import did_you_mean
from qwenimg_dist.patience import StorageAwayError

COMMANDS: Final = {
    "demo": "qwenimg_dist.commands.demo",
    "demo-post": "qwenimg_dist.commands.demo_post",
    "produce": "qwenimg_dist.commands.produce",
    "train": "qwenimg_dist.commands.train",
    "run": "qwenimg_dist.commands.run",
    "plan": "qwenimg_dist.commands.plan",
    "doctor": "qwenimg_dist.commands.doctor",
    "data": "qwenimg_dist.commands.data",
    "ckpt": "qwenimg_dist.commands.ckpt",
    "eval": "qwenimg_dist.commands.eval",
    "report": "qwenimg_dist.commands.report",
    "sample": "qwenimg_dist.commands.sample",
    "pairs": "qwenimg_dist.commands.pairs",
    "config": "qwenimg_dist.commands.config",
}

DEBUG_VARIABLE: Final = "QWENIMG_DIST_DEBUG"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if args else 2
    if args[0] == "--version":
        from qwenimg_dist import __version__

        print(__version__)
        return 0
    name, rest = args[0], args[1:]
    if name not in COMMANDS:
        return _fail(f"unknown command {name!r}{did_you_mean(name, list(COMMANDS))}; there is: {', '.join(COMMANDS)}")
    command = load(name)
    if any(word in ("-h", "--help") for word in rest):
        print(f"qwenimg-dist {name}: {command.SUMMARY}\n\n{(command.__doc__ or '').strip()}")
        return 0
    try:
        return int(command.run(rest))
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on from here", 1)
    except ValueError as error:  # ConfigError and DataError among them: what the user gave is unusable
        return _fail(str(error), 2)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except StorageAwayError as error:
        return _fail(f"{error}; the same command goes on once it does", 1)
    except OSError as error:
        return _fail(describe_os_error(error), 1)
    except Exception as error:  # the last line of defence: a named failure, the traceback for the report
        traceback.print_exc()
        return _fail(f"{type(error).__name__}: {error}", 1)


def load(name: str) -> ModuleType:
    """The command's module; imported only when it is asked for, since some cost seconds."""
    return importlib.import_module(COMMANDS[name])


def overview() -> str:
    """The help text."""
    lines = ["usage: qwenimg-dist COMMAND [key=value ...]     (Hydra overrides; COMMAND --help says more)", ""]
    lines += [f"  {name:<9} {load_summary(name)}" for name in COMMANDS]
    lines += ["", "exit codes: 0 done, 1 failed, 2 unusable input", f"{DEBUG_VARIABLE}=1 shows tracebacks"]
    return "\n".join(lines)


def load_summary(name: str) -> str:
    """A command's one line."""
    return str(load(name).SUMMARY)


def _fail(message: str, code: int = 2) -> int:
    if os.environ.get(DEBUG_VARIABLE):
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    return code
