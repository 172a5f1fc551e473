"""Kernels of the reduction over classes, behind the interface head/chunked_softmax.py Kernel.

    fused.py       the reduction of each chunk, and its backward, from four operations
    triton_ops.py    those operations as Triton programs
    torch_ops.py    those operations by torch.compile, the rival
    native.py      on a CPU, the plain form with passes that the machine's compiler has built
    autotune.py      which form a run takes: by name, or by measurement at its start

The plain form in head/chunked_softmax.py stays the reference and computes what the others cannot.
"""
