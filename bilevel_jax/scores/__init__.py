"""One number per example from a language model's likelihoods; larger is better, always."""
