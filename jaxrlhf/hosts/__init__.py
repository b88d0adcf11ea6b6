"""The host's side: several processes, signals, compiler flags, profiler."""
