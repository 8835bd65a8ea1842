"""From the values or texts that data sets label their images with to classes."""

import re
from collections.abc import Sequence

import numpy as np


def classes_of_values(values: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class of each image and the names of the classes, from integers.

    Returns:
        int64 ``[n]``, and the values that occur, in numeric order, as text of equal width, so that folders named after
        the classes sort like the classes.
    """
    classes, labels = np.unique(values, return_inverse=True)
    width = max(len(str(value)) for value in classes)
    return labels.astype(np.int64), tuple(f"{value:0{width}d}" for value in classes)


def classes_of_texts(texts: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """The same from texts: as integers if all of them are, else sorted as they are."""
    # To Python 1_2 is the integer 12, and a number of 19 digits may not fit in 64 bits.
    if all(re.fullmatch(r"[+-]?[0-9]{1,18}", text) for text in texts):
        return classes_of_values(np.array([int(text) for text in texts], dtype=np.int64))
    names = sorted(set(texts))
    number = {name: label for label, name in enumerate(names)}
    return np.array([number[text] for text in texts], dtype=np.int64), tuple(names)
