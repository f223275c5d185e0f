"""Use a compact layer on its own: gather, product, activation, scatter and residual add in one call.

Equivalent to:
    y = residual.clone(); y[..., out_index] += gelu(x[..., in_index] @ weight.T + bias)
"""

import torch

import prunekern as pk

generator = torch.Generator().manual_seed(0)
x = torch.randn(4, 128, 768, generator=generator)  # [batch, tokens, in]
residual = torch.randn(4, 128, 768, generator=generator)
in_index = torch.arange(0, 768, 2)  # channels of x that are kept
out_index = torch.randperm(768, generator=generator)[:577].sort().values  # channels of y that are kept
weight, bias = torch.randn(577, 384, generator=generator) / 20, torch.randn(577, generator=generator)

layer = pk.nn.CompactLinear(weight, bias, in_index, out_index, out_features=768, activation="gelu")
y = layer(x, residual=residual)

expected = residual.clone()
expected[..., out_index] += torch.nn.functional.gelu(x[..., in_index] @ weight.T + bias)
print(f"largest difference to the definition: {(y - expected).abs().max():.1e}")
assert torch.allclose(y, expected, rtol=1e-4, atol=1e-4)
