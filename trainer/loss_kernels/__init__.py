"""From logits to a loss and its gradient: every pass over `[M, V]` logits is in this folder.

`logit_view.py` reads the logits and writes their gradient, and `fused_head.py` does so in chunks behind the head.
`row_passes.py` is the contract of the passes themselves, `triton_passes.py` their version for GPUs.
"""
