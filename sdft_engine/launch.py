"""Training in several processes of this machine: `python -m sdft_engine.launch PROCESSES RUN_DIR`.

torchrun (docs/trainer.md), which ends with whoever started it: the request to be killed then outlives the exec, and each process that
torchrun starts makes the same request of torchrun.
"""

import os
import signal
import sys
from pathlib import Path

from sdft_engine.contract.death_with_parent import die_with_parent
from sdft_engine.contract.run_directory import EXIT_LEASE_EXPIRED, RunDirectory

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")


def main() -> int:
    processes, run = int(sys.argv[1]), RunDirectory(Path(sys.argv[2]).resolve())
    supervisor = run.read_control().supervisor_pid
    if supervisor is not None:
        die_with_parent()
        if os.getppid() != supervisor:  # it died before the request was made
            return EXIT_LEASE_EXPIRED
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # torchrun would end; the trainers it starts say what they do
    os.execv(sys.executable, [*TORCHRUN, f"--nproc-per-node={processes}", "-m", "sdft_engine.train", str(run.path)])


if __name__ == "__main__":
    sys.exit(main())
