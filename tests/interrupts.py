"""Ctrl-C for a child process, also where this one was started with it turned off (in the background of a shell)."""

from __future__ import annotations

import signal


def listen_to_interrupts() -> None:
    """For `subprocess.Popen(preexec_fn=…)`: a signal that is ignored stays ignored in children, and Python then sets up
    no KeyboardInterrupt."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
