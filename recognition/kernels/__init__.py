"""Fused forms of the reduction over classes, behind the functions of losses/reduction.py.

    fused.py       the reduction of chunk after chunk from four operations, and its backward
    programs.py    those operations as Triton programs
    compiled.py    those operations by torch.compile, the rival
    native.py      on a CPU, the plain form over passes that the machine's compiler has built
    choice.py      which form a run takes: by name, or by measurement at its start

The plain form, losses/logits.py, stays the truth, and takes what the fused ones do not.
"""
