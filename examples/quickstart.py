"""A row alone and the same row in a batch: default torch.compile, then batch_invariant."""

import torch

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(512, 2048), torch.nn.GELU(), torch.nn.Linear(2048, 512)
).eval()
batch = torch.randn(8, 512)

for backend in ("inductor", "batch_invariant"):
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        alone, in_batch = compiled(batch[:1])[0], compiled(batch)[0]
    print(f"{backend:>15}: {(alone != in_batch).sum()} of 512 numbers of the row differ")
