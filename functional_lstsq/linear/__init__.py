"""A linear solve as a differentiable function: the primitives over the solvers.

- arguments: what `lstsq` and `solve` are asked, checked; posed: the solution of that.
- augmented: the primitive `solve_augmented` and its derivatives, for a sparse matrix; matrix_free: for an operator,
  by operator_static, what is called of it, and operator_products, what solvers ask of it; operator_graph: one in a
  graph of torch.compile.
- gradient: that by A, a primitive of its own, since what rounding has left out of a solution matters to its derivative.
- kernel: the library operation behind both, plain tensors in, solution and report out; blocks: right-hand sides, some
  at a time; small: what is left to one call of compiled code; refusals: what it refuses.
- settings: what a solve is asked for, as a text that a graph can carry; factor_cache: where factors live between a
  solve and its derivatives; factorization: a matrix with factors that a user keeps.
- weighting: weights and constraints in the system. low_parts: what rounding has left out of a solution.
- bounds: bounded solves, by one solve on the free unknowns; active_set: the search for these, which `guess` begins;
  pivoting: its solves, and what each says of the minimum; bounded_operator: the same of an operator; strict: what of
  a solution and its derivatives is refused.
- weakest: the smallest singular values and their vectors, with derivatives to third order.
- verdict: whether a solution is in range, and whether a derivative may be made of it.
"""
