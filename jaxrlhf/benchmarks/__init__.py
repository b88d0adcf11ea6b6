"""How fast an iteration is on this machine, and what limits it: ``jaxrlhf benchmark``.

The real programs of a config run on random weights and random tokens, so that no weights, data, tokenizer or network
are needed (case.py, rows.py); they are timed (timed.py), their work is counted (work.py), and both are held against
what this machine itself reaches (machine.py).
"""
