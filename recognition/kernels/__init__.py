"""Kernels of the reduction over classes, behind the interface losses/logits.py Kernel.

    fused.py       the reduction of each chunk, and its backward, from four operations
    programs.py    those operations as Triton programs
    compiled.py    those operations by torch.compile, the rival
    native.py      on a CPU, the plain form with passes that the machine's compiler has built
    choice.py      which form a run takes: by name, or by measurement at its start

The plain form in losses/logits.py stays the reference and computes what the others cannot.
"""
