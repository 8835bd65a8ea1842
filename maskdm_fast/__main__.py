"""``python -m maskdm_fast``: the command line, for launchers that start modules."""

from maskdm_fast.cli import run

run()
