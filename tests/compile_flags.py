"""XLA's flags for programs that are compiled once and run for seconds: half the time of the suite, nearly all of it compiles.

LLVM's optimisation is a third of a compile, and the MLIR emitters of fusions half of the rest; jax 0.11 has no others.
"""

import jax

COMPILE_FLAGS = "--xla_backend_optimization_level=0"
if jax.__version_info__ < (0, 11):
    COMPILE_FLAGS += " --xla_cpu_use_fusion_emitters=false"
