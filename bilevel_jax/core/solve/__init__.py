"""Solvers on arrays: training and hypergradient as one pure function."""
