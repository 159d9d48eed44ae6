"""How fast a run is: what its figures are made of."""

import subprocess
import sys
import time

SCRIPT = """
import time
from neva_jax.training.meter import seconds_since_start
first = seconds_since_start()
time.sleep(0.5)
print(first, seconds_since_start())
"""


def test_seconds_since_the_process_began_count_its_imports():
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    whole = time.monotonic() - began
    first, second = map(float, done.stdout.split())
    assert 0.1 < first < second - 0.49  # JAX alone takes longer to import
    assert second < whole + 0.1  # clock ticks are hundredths
