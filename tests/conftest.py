"""Eight fake CPU devices, and compiled programs kept between runs of the suite."""

import os
import tempfile

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", os.path.join(tempfile.gettempdir(), "jaxrlhf-test-xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
