"""Device code in the subset of Triton that triton-ascend 3.2.0 and upstream Triton 3.9 share.

Beside each kernel stands its specification in plain torch. Importing this package imports nothing; importing
one of its modules needs a `triton`. What the subset is, and why, is written in docs/triton.md.
"""
