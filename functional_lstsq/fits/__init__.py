"""A minimum as a differentiable function: nonlinear and robust fits.

- objective: what is minimised, from residuals, a loss and a damping; losses: `Huber` and the other ones.
- rows: what is summed and decided over all residuals, wherever these are.
- attempts: the two attempts at a minimum; levenberg_marquardt: the steps that lead to one, and Newton's steps that end
  there; geodesic: better steps, bent in curved valleys, Newton's where reweighting is slow. bounded: which unknowns are
  at their bounds.
- jacobian: of a residual, whole, on a pattern, or by a function of the user's.
- model: the quadratic model at a point, by the Jacobian; hessian: solves with the matrix of second derivatives there.
- minimum: the primitive `Minimum`, a function of the data by the gradient that vanishes, and its derivatives.
- robust: `robust=` of linear solves, by reweighting.
- posing: a fit as it is asked for, as an objective. arguments: what fits are asked, checked. trees: unknowns and
  residuals that are pytrees; scale: the scale of the residuals, estimated with the minimum.
- rounding: how large rounding errors are in f and in its gradient, and which steps they explain.
- report: what a fit tells of itself, and the errors it raises.
"""
