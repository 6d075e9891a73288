"""``python -m loraloom.cli``, as torchrun starts it."""

from loraloom.cli import main

if __name__ == "__main__":
    main()
