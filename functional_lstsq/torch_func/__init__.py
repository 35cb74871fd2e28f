"""What torch needs of a primitive: the bottom floor, and the only one that touches torch._C and torch._functorch.

- primitive: `Primitive`, an autograd function that every transformation of torch.func goes through. reverse_mode: its
  nodes on a level of torch.func. operations: `define` makes a kernel an operation that is opaque to every tracer.
- tracing: what is under the wrappers of a tensor, and whether a compiler or a tracer records.
- forward_mode: directional derivatives, one thread at a time.
- closures: functions of the user's, freed of tensors that belong to transformations.
- layouts: sparse tensors of torch, taken apart and put together under torch.func.
- process: what becomes of threads and of forks. cores: how many threads of OpenMP work, where others use the cores.

Nothing of least squares is known here.
"""
