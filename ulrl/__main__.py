"""python -m ulrl, which is `ulrl`."""

from ulrl.cli import main

if __name__ == "__main__":
    main()
