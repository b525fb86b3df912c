"""Language models with their data, losses, likelihoods and generation.

`load` gives a model that fine-tunes with hypergradients, scores data and generates; the other names are what it is made
of. Flax is fenced in here, and nothing in it sees an optimizer. The names are imported when they are first read.
"""

import importlib
import os
from typing import Any

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise to install PyTorch, unused here

_MODULE_OF = {
    # a model to load, fine-tune, score with and generate with: of a package above this one, which nothing here imports
    "DataSection": "bilevel_jax.runs.config.schema",
    "FineTuned": "bilevel_jax.language_model.finetuning",
    "LanguageModel": "bilevel_jax.language_model.model",
    "LoraSection": "bilevel_jax.runs.config.schema",
    "MeshSection": "bilevel_jax.runs.config.schema",
    "ObjectiveSection": "bilevel_jax.runs.config.schema",
    "TargetSection": "bilevel_jax.runs.config.schema",
    "builtin_rows": "bilevel_jax.language_model.model",
    "load": "bilevel_jax.language_model.model",
    # a model from a Hugging Face folder, and back
    "DecoderConfig": "models",
    "init_lora": "models",
    "init_params": "models",
    "join_adapters": "models",
    "load_model": "models",
    "load_peft": "models",
    "make_decoder": "models",
    "merge_adapters": "models",
    "save_model": "models",
    "save_peft": "models",
    # examples, tokens and batches
    "Corpus": "data.tokens",
    "Example": "data.examples",
    "encode_examples": "data.encode",
    "find_leaks": "data.examples",
    "fit_batch_shape": "data.batches",
    "fit_evaluation_batch_shape": "data.batches",
    "load_examples": "data.examples",
    "load_tokenizer": "data.tokens",
    "read_examples": "data.examples",
    "make_evaluation_stream": "data.batches",
    "make_train_stream": "data.batches",
    "shuffled_order": "data.batches",
    "split_examples": "data.examples",
    "tokenize": "data.tokens",
    # per-example losses
    "dpo_composite_loss": "losses.preferences",
    "dpo_losses": "losses.preferences",
    "importance_weighted_losses": "losses.importance",
    "mean_over_targets": "losses.sft",
    "policy_losses": "losses.policy",
    "sequence_log_likelihoods": "losses.sft",
    "sft_composite_loss": "losses.sft",
    "sft_losses": "losses.sft",
    "simpo_composite_loss": "losses.preferences",
    "simpo_losses": "losses.preferences",
    # log-likelihoods and generation
    "LogLikRequest": "inference.loglik",
    "Prompt": "inference.generate",
    "SamplingParams": "inference.sampling",
    "make_chat_client": "inference.openai",
    "make_loglik_scorer": "inference.loglik",
    "make_prompts": "inference.prompts",
    "make_sampler": "inference.generate",
}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        module = _MODULE_OF[name]
        module = module if module.startswith("bilevel_jax.") else f"{__name__}.{module}"
        return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
