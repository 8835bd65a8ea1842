"""Files that commands write when their work is done."""

import os
from pathlib import Path


def check_file(path: Path) -> None:
    """Raise ValueError if no file can be made at `path`, before any work is done for it; its folders need not be there
    yet."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: want the name of a file")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ValueError(f"{path} cannot be written: {above} is a file")
    if not os.access(above, os.W_OK):
        raise ValueError(f"{path} cannot be written: {above} is read-only")
