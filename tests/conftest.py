"""Settings that every test shares."""

import os

# xdist runs one process per core; more threads in each would only fight over them. Set before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
