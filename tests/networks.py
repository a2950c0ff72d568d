"""Networks that together hold everything a network may have, for whoever builds or writes them."""

from __future__ import annotations

from space.architecture import NetworkStyle

SYMMETRIC = NetworkStyle("symmetric", 1e-5, 0.9)

#: Together they hold every operation, kernel, skip, squeeze-and-excitation, widths that grow and
#: shrink under pooling, odd sizes, gray images, both stems.
EVERYTHING = (
    "stem8_s11 | r2_k3_s11_e1_i8_o16_se0.25_pool | r2_k5_s22_e1_i16_o12_pool_conv"
    " | r2_k3_s22_e3_i12_o24_se0.25_pool | r1_k5_s22_e6_i24_o16_pool | head32 | r19 | c5 | in1"
)
IDENTITIES = (
    "stem8 | r2_k3_s11_e1_i8_o8_conv | r2_k7_s22_e2_i8_o12_se0.5 | r1_k3_s11_e1_i12_o12_se1_conv"
    " | r2_k5_s11_e4_i12_o12_noskip | head24 | r30 | c7"
)
