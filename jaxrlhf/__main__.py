"""``python -m jaxrlhf`` is the ``jaxrlhf`` command."""

from jaxrlhf.cli.app import main

if __name__ == "__main__":
    main()
