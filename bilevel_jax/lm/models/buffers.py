"""Causal masks and rotary frequencies in old checkpoints.

They are not loaded, as in transformers 5: the model computes them. Each is compared with what the model computes, since
older programs used what the file holds.
"""

import numpy as np

from bilevel_jax.lm.checkpoint.files import LazyTensor
from bilevel_jax.lm.models.config import DecoderConfig, RopeConfig, rope_frequencies

FREQUENCY_ENDS = (".rotary_emb.inv_freq", ".rotary_emb_local.inv_freq")
MASK_ENDS = {"gpt2": (".attn.bias", ".attn.masked_bias"), "gpt_neox": (".attention.bias", ".attention.masked_bias")}
"""Ends of names: the mask, and the number that stood where it hides a token."""


def is_buffer(config: DecoderConfig, name: str) -> bool:
    """Whether a tensor of that name is a mask or rotary frequencies."""
    return name.endswith(_ends(config))


def check_buffer(config: DecoderConfig, tensor: LazyTensor) -> None:
    """Raise ValueError where a mask or rotary frequencies in a file are other ones than the model computes."""
    values = tensor.read().astype(np.float64)
    if tensor.name.endswith(FREQUENCY_ENDS):
        ropes = [rope for rope in (config.rope, config.local_rope) if rope is not None]
        plain = [RopeConfig(rope.theta, rotary_fraction=rope.rotary_fraction) for rope in ropes]  # scaled when used
        relative, absolute = (1e-5, 1e-8) if tensor.dtype() in ("F32", "F64") else (2**-7, 2**-14)
        known = any(
            values.shape == (frequencies := rope_frequencies(rope, config.head_dim)).shape
            and np.allclose(values, frequencies, relative, absolute)
            for rope in [*ropes, *plain]
        )
        meaning = "rotary frequencies"
    elif tensor.name.endswith("masked_bias"):
        known, meaning = values.size == 1 and bool((values <= -1e4).all()), "a masked score"
    else:
        length = values.shape[-1] if values.ndim else 0
        known = values.shape[-2:] == (length, length) and values.size == length**2
        known = known and np.array_equal(values.reshape(length, length) != 0, np.tri(length, dtype=bool))
        meaning = "a causal mask"
    if not known:
        raise ValueError(
            f"{tensor.path}: {tensor.name} is {meaning} of other values than the model of its config.json computes; "
            "correct config.json, or delete the tensor if it is of no use."
        )


def _ends(config: DecoderConfig) -> tuple[str, ...]:
    return (*(FREQUENCY_ENDS if config.rope else ()), *MASK_ENDS.get(config.family, ()))
