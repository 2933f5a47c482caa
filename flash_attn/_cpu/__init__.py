"""The CPU backend's maths: plain torch operations on blocks, memory linear in sequence length."""
