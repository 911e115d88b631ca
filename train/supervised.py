"""A command that ends with the process that started it: `python -m train.supervised train --recipe some.yaml`.

What starts it holds the other end of its standard input and never writes. When that end is closed, be it because the
starter was killed, the command is asked to stop as by SIGTERM: training finishes the step in hand and saves it.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading


def end_with_starter() -> None:
    """From now on this process gets SIGTERM when its standard input is closed."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="starter", daemon=True).start()


def main() -> None:
    """Run the module that the first word names, as `python -m` would, with the words after it."""
    end_with_starter()
    module, *words = sys.argv[1:]
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
