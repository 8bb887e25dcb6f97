"""`python -m align_ti` is `align-ti`."""

from align_ti.cli import main

if __name__ == "__main__":
    main()
