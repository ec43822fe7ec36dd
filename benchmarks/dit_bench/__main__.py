"""``python -m dit_bench …`` does what ``dit-bench …`` does, also without installation."""

from __future__ import annotations

if __name__ == "__main__":  # before anything else is imported
    from dit_engine.first import leave_out_of_path

    leave_out_of_path()
    from dit_engine.console.run import wait_briefly

    wait_briefly()

import sys

from dit_bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
