"""Published results in miniature: one file a benchmark, each with a record BENCHMARK and a shorter twin QUICK."""
