"""The ``jaxrlhf`` command."""
