"""What A is: a sparse matrix or an operator, its products, and the numbers that they are made of.

- pattern, matrix, operator, jacobian_operator: `SparsePattern`, `SparseMatrix`, `LinearOperator` and
  `JacobianOperator`. wrapped_products: what is put around the products of a user. trees: pytrees of tensors as vectors.
- algebra, operator_algebra, building: sums, products, parts and stacks of them, by patterns that merging makes once.
- entries, triple: the primitives `take` and `place` of values, and `triple`, of which A B is made.
- products: the primitives `multiply` and `sample`, each the derivative of the other.
- base: `Products`, all that solvers ask of a matrix. plain_products: those of a sparse one. csr_product: A B.
  exact_products: products in twice the working precision.
- precision: the primitive `convert`, into double precision and back.
- gram_pattern, coloring: what follows from a pattern alone, for A^H A and for Jacobians. places: where rows are.
- numerics, double_double: powers of two, noise that is the same every time, pairs of doubles.
- picture: the pattern of a large matrix in a few cells.
- lazy: an attribute that is made when it is first asked for.
- kernels: products, sampled products, A^H A and iterations in compiled code, where Numba is; entry_kernels: passes
  over the entries; dense_kernels: dense factors; small_kernels: whole solves of small systems; normal_iteration:
  iterations with products of A^H A; column_search: iterations towards known solutions; helpers: threads that help with
  them. compiled, compiled_bounds, compiled_colors, compiled_columns, compiled_dense, compiled_entries,
  compiled_iteration, compiled_normal, compiled_refinement, compiled_small, compiled_triple: their loops.
"""
