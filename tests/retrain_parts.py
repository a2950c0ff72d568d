"""What the retrain room's tests share: a network and a recipe that train in seconds."""

from __future__ import annotations

from space.architecture import Architecture, parse_architecture

TINY_TEXT = "stem8_s11 | r1_k3_s22_e3_i8_o16_se0.25_noskip | head48 | r8 | c10 | in1"
TINY: Architecture = parse_architecture(TINY_TEXT)

TINY_RECIPE = """
data: {name: digits, validation_fraction: 0.2}
epochs: 3
batch_size: 32
eval_batch_size: 100
schedule: {learning_rate: 0.05}
ema_decay: 0.9
dropout: 0.1
augment: {shift: 1}
style: {batch_norm_momentum: 0.8}
"""
