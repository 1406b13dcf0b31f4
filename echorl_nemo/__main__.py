"""`python -m echorl_nemo` is the console script `echorl-nemo`."""

import sys

from echorl_nemo.cli import main

if __name__ == "__main__":
    sys.exit(main())
