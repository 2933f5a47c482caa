"""What an installation tells: lines on stderr, and on the terminal what nobody may miss.

Installers keep stderr to themselves unless a build fails or `-v` is given. What takes long, or what
is installed in place of something else, is therefore said on the terminal too, if there is one.
"""

from __future__ import annotations

import sys
from contextlib import suppress

from build_tools.wheel_name import PROJECT

TERMINAL = "CONOUT$" if sys.platform == "win32" else "/dev/tty"


def log(line: str) -> None:
    """A line on stderr: stdout belongs to results."""
    print(f"{PROJECT}: {line}", file=sys.stderr, flush=True)


def announce(line: str) -> None:
    """A line that is seen even where an installer hides stderr."""
    log(line)
    if not sys.stderr.isatty():
        # Without a terminal, as in CI, stderr has to do. A new line ends the installer's spinner.
        with suppress(OSError), open(TERMINAL, "w", encoding="utf-8") as terminal:  # noqa: PTH123
            terminal.write(f"\r\n{PROJECT}: {line}\r\n")
