"""Pure bookkeeping of conversations: which tokens, which blocks, what can be reused. No tensors, no I/O."""
