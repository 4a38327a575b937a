"""From logits to a loss and its gradient: every pass over `[M, V]` logits is in this folder.

`logit_view.py` reads the logits and writes their gradient, `fused_head.py` does so in chunks behind the head,
`triton_passes.py` is the GPU version, and `kernel_choice.py` checks and selects it.
"""
