"""The parameters of a request to a chat completion server."""

SERVICE_PARAMETERS = ("n", "seed", "temperature", "top_p", "top_k", "max_tokens", "logprobs")
"""What is sent beside the model and the messages; `parameter_names` gives one of them another name, or none."""
