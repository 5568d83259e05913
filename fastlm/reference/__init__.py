"""Every op in plain PyTorch, written for reading: the specification that each fast implementation must meet.

Imports torch alone. Each function is itself tested against torch's own operators in float64.
"""
