"""Loss of a weight's gradient when devices add up their parts in bfloat16, by the number of devices.

python benchmarks/gradient_rounding.py; NumPy alone. Each device has a part, noise of a batch plus a mean that all
share, and rounds it to bfloat16, as a matmul's output is. The parts are then added around a ring, as reduce-scatter
does, in bfloat16 or in float32. Prints the error of the sum, relative to its size.
"""

import ml_dtypes
import numpy as np

COUNT, SEEDS = 4096, 3


def error(num_devices: int, shared: float, dtype) -> float:
    """RMS error over RMS of the sum; `shared`: the mean of the parts over their standard deviation."""
    errors = []
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        parts = shared * rng.standard_normal(COUNT) + rng.standard_normal((num_devices, COUNT))
        total = np.zeros(COUNT, dtype)
        for part in parts.astype(ml_dtypes.bfloat16):
            total = (total + part.astype(dtype)).astype(dtype)
        exact = parts.sum(0)
        errors.append(np.sqrt(np.mean((total.astype(float) - exact) ** 2) / np.mean(exact**2)))
    return float(np.mean(errors))


def main() -> None:
    print("| devices | noise alone, bf16 | float32 | mean as large as noise, bf16 | float32 |\n|---|---|---|---|---|")
    for num_devices in (8, 16, 64, 256, 1024):
        found = [error(num_devices, shared, d) for shared in (0.0, 1.0) for d in (ml_dtypes.bfloat16, np.float32)]
        print(f"| {num_devices} | " + " | ".join(f"{e:.2%}" for e in found) + " |")


if __name__ == "__main__":
    main()
