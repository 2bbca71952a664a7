"""`python -m launcher VERB ...` is the same as `meshwright VERB ...`."""

from launcher.cli import main

if __name__ == "__main__":
    main()
