"""A start script, as jobs have them: the rank is its child, and msrun watches the script itself.

So a rank that dies does not end the job at once, and the others have the time to say what they were told.
"""

import os
import runpy
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    worker = os.environ["MS_ROLE"] == "MS_WORKER"
    child = os.fork() if worker else 0
    if child:
        os.waitpid(child, 0)
        end = time.monotonic() + 90
        while not Path(sys.argv[1], "rank-0.json").exists() and time.monotonic() < end:
            time.sleep(0.1)
        os._exit(0)
    runpy.run_path(str(Path(__file__).with_name("msrun_job.py")), run_name="__main__")
