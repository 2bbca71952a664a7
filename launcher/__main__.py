"""`python -m launcher VERB ...` is the same as `meshwright VERB ...`."""

import sys

if __name__ == "__main__":
    try:
        from launcher.cli import main

        main()
    except KeyboardInterrupt:
        sys.exit(130)
