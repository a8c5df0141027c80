from __future__ import annotations

import os

# The tests share their cores with whatever else runs: threads that spin while they wait for each
# other make every small operation wait for the scheduler. Must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
