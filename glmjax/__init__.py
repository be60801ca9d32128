"""glmjax: a JAX/XLA server for the GLM-4.5 family."""
