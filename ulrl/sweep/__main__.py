"""python -m ulrl.sweep FILE, which is `ulrl sweep FILE`."""

import sys

from ulrl.cli import main

if __name__ == "__main__":
    main(["sweep", *sys.argv[1:]])
