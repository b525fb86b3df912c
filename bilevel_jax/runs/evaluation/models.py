"""The models that are evaluated: folders, adapters, runs and services."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from bilevel_jax.core.types import Params
from bilevel_jax.lm import models
from bilevel_jax.lm.checkpoint.folders import ModelFolder, find_model_folder
from bilevel_jax.lm.data.encode import DEFAULT_TEMPLATE
from bilevel_jax.lm.data.render import Tokenizer, get_chat_template
from bilevel_jax.lm.data.tokens import load_tokenizer
from bilevel_jax.lm.data.vocabulary import check_special_tokens
from bilevel_jax.runs.config.load import CompareConfig, EvaluateConfig, RefineConfig, SelectConfig, TrainConfig
from bilevel_jax.runs.config.local_paths import short_file_names
from bilevel_jax.runs.config.rules import names_service, split_service
from bilevel_jax.runs.config.schema import GenerateSection
from bilevel_jax.runs.infra import sharding
from bilevel_jax.runs.infra.placement import make_mesh

ROLES = ("model", "baseline")
"""What the first and the second model are called in tables; the keys of evaluate that name them."""
EvaluatingConfig = EvaluateConfig | SelectConfig | TrainConfig | RefineConfig | CompareConfig
"""Of the commands that ask models prompts and compare their answers."""


class Service(NamedTuple):
    """A model on a server."""

    name: str
    url: str

    def settings(self, generate: GenerateSection) -> GenerateSection:
        """How it is asked."""
        return replace(generate, backend="service", url=self.url, model=self.name)


class LocalModel(NamedTuple):
    """A model in this process, before its parameters are loaded."""

    tokenizer: Tokenizer
    architecture: models.DecoderConfig
    decoder: models.Decoder
    mesh: Mesh
    load_params: Callable[[], Params]
    """Whole parameters on the mesh, with the adapter's where there is one."""
    folders: ModelFolder | None = None
    """Where it lies; None for a model of the run itself."""


@dataclass(frozen=True)
class Candidate:
    """One of the models that answer the prompts."""

    role: str
    """model or baseline; in a run that evaluates its own models, which of them."""
    name: str
    """What reports call it."""
    service: Service | None
    local: LocalModel | None
    """One of the two."""

    @property
    def template(self) -> str:
        """The text that its prompts are made by; empty for a service, which has its own."""
        if self.local is None:
            return ""
        return get_chat_template(self.local.tokenizer)

    @property
    def kind(self) -> str:
        """What it is, for people."""
        if self.service is not None:
            return f"service at {self.service.url}"
        assert self.local is not None
        has_adapter = self.local.folders is not None and self.local.folders.adapter is not None
        return "adapter on its base" if has_adapter else "model in this process"


def open_candidates(config: EvaluateConfig) -> list[Candidate]:
    """The models that a config names, the first one first; parameters are not loaded.

    Raises FileNotFoundError or ValueError for a folder that holds no model, or one that cannot be read.
    """
    paths = [path for path in (config.evaluate.model, config.evaluate.baseline) if path]
    return [
        _open_candidate(config, role, path, name)
        for role, path, name in zip(ROLES, paths, _name_models(paths), strict=False)
    ]


def describe_templates(candidates: Sequence[Candidate], template: str) -> list[str]:
    """How each model's prompts are made, in sentences."""
    described = []
    for candidate in candidates:
        if candidate.local is None:
            words = "messages, to which the server applies the model's own chat template"
        elif candidate.template:
            words = "by the chat template of its own tokenizer"
        else:
            words = f"by the plain template {template or DEFAULT_TEMPLATE!r}: its tokenizer has no chat template"
        described.append(f"prompts of {candidate.name}: {words}")
    local = [candidate for candidate in candidates if candidate.local is not None]
    if len(local) == 2 and local[0].template != local[1].template:
        described.append("the two models have different templates, and each is asked by its own")
    return described


def _open_candidate(config: EvaluateConfig, role: str, path: str, name: str) -> Candidate:
    if names_service(path):
        return Candidate(role, name, Service(*split_service(path)), None)
    if path.startswith("builtin:"):
        raise ValueError(
            f"evaluate.{role} is {path!r}: a built-in model is made within a run. Give the folder of that run, such as "
            "out/quickstart."
        )
    folders = find_model_folder(path, config.evaluate.base)
    tokenizer, architecture = load_tokenizer(folders.tokenizer), models.read_config(folders.base)
    check_special_tokens(folders.tokenizer, tokenizer, architecture.vocab_size)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    rules = sharding.parse_sharding_rules(config.mesh.sharding_rules, mesh)
    decoder = models.make_decoder(architecture, remat="none", gather_params=sharding.parameter_gatherer(mesh, rules))
    dtype = jnp.dtype(config.evaluate.dtype)

    def load_params() -> Params:
        _, params = models.load_model(folders.base, dtype=dtype, place=sharding.parameter_placer(mesh, rules))
        if folders.adapter is None:
            return params
        adapters = models.load_peft(folders.adapter, architecture, dtype=dtype)
        return models.join_adapters(params, sharding.shard_tree(mesh, rules, adapters))

    return Candidate(role, name, None, LocalModel(tokenizer, architecture, decoder, mesh, load_params, folders))


def _name_models(paths: Sequence[str]) -> list[str]:
    short: dict[str, Any] = short_file_names(path for path in paths if not names_service(path))
    names = [split_service(path)[0] if names_service(path) else short[path] for path in paths]
    if len(set(names)) < len(names):
        return [f"{name} ({role})" for name, role in zip(names, ROLES, strict=False)]
    return names
