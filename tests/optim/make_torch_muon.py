"""Makes golden/torch_muon.npz: three steps of torch.optim.Muon on three shapes (needs the extra [interop])."""

from pathlib import Path

import numpy as np
import torch

SHAPES = {"tall": (48, 16), "wide": (16, 48), "square": (32, 32)}


def main() -> None:
    stream, found = np.random.RandomState(0), {"versions": np.array(f"torch {torch.__version__}")}
    for name, shape in SHAPES.items():
        start = 0.1 * stream.standard_normal(shape).astype(np.float32)
        gradients = stream.standard_normal((3, *shape)).astype(np.float32)
        parameter = torch.nn.Parameter(torch.tensor(start))
        # torch's weights are [outputs, inputs], but neither the iteration nor the factor minds
        optimizer = torch.optim.Muon(
            [parameter], lr=1e-2, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
        )
        for gradient in gradients:
            parameter.grad = torch.tensor(gradient)
            optimizer.step()
        found |= {f"{name}_start": start, f"{name}_gradients": gradients, f"{name}_end": parameter.detach().numpy()}
    folder = Path(__file__).parent / "golden"
    folder.mkdir(exist_ok=True)
    np.savez_compressed(folder / "torch_muon.npz", **found)


if __name__ == "__main__":
    main()
