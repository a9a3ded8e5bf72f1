"""A job does not outlive the process that launched it."""

from __future__ import annotations

import os
import signal
import threading
import time

__all__ = ["WATCH", "stop_with_launcher"]

WATCH = "LIGHTNING_COMPRESS_LAUNCHER"  # the process id that a sweep's job belongs to
SECONDS = 1.0
PATIENCE = 30.0  # seconds to save and end in, before the next interrupt


def stop_with_launcher() -> None:
    """Interrupt this process, as Ctrl-C would, once the one that launched it is gone.

    Does nothing in a process that no sweep launched. The job's own children are not told to
    watch: they belong to the job.
    """
    launcher = os.environ.pop(WATCH, None)
    if launcher is not None and os.name == "posix":
        watch = threading.Thread(target=_watch, args=(int(launcher),), daemon=True)
        watch.start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(SECONDS)
    while True:  # Python drops an interrupt that comes while it collects garbage
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(PATIENCE)
