"""Settings for the kernels that run the notebooks under pytest.

There a notebook trains for a few steps only: its cells' metadata, `nbmake`, say for how many.
"""

import os

# Kernels of notebooks that are tested side by side would wait for each other's threads, and run
# past their time.
os.environ["OMP_NUM_THREADS"] = "1"
