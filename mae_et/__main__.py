"""`python -m mae_et`."""

from .cli import main

if __name__ == "__main__":
    main()
