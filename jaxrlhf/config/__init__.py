"""A config: the record, read from YAML and the command line, checked, and explained."""
