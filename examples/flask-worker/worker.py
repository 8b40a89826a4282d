"""The worker process: takes no requests, does something every few seconds."""

import signal
import sys
import time

signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))

beat = 0
while True:
    beat += 1
    print(f"worker beat {beat}", flush=True)
    time.sleep(2)
