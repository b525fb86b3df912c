"""A language model to load, fine-tune, score with and generate with from Python."""

import dataclasses
import inspect
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Float

from bilevel_jax.core.training import ProductPrecision
from bilevel_jax.core.types import LinearSolver, Params
from bilevel_jax.language_model import finetuning, inference, scoring
from bilevel_jax.language_model.finetuning import FineTuned, SolverOptions, Target
from bilevel_jax.language_model.inference import LogLiks
from bilevel_jax.language_model.scoring import Scores
from bilevel_jax.lm import models
from bilevel_jax.lm.data import files, tokens
from bilevel_jax.lm.data.examples import Example, read_examples
from bilevel_jax.lm.data.vocabulary import check_special_tokens
from bilevel_jax.lm.inference.generate import Response
from bilevel_jax.lm.inference.sampling import SamplingParams
from bilevel_jax.runs.config.schema import DataSection, LoraSection, MeshSection, ObjectiveSection, Remat
from bilevel_jax.runs.infra import sharding
from bilevel_jax.runs.infra.placement import make_mesh
from bilevel_jax.runs.tasks.builtin import BUILTIN_PREFIX, BUILTIN_TASKS, pretrain_builtin_model
from bilevel_jax.runs.tasks.splits import make_data_options

Dtype = Literal["float32", "float64", "bfloat16"]


@dataclass(frozen=True, eq=False, repr=False)
class LanguageModel:
    """A model with its tokenizer, on its devices; `load` reads one, and nothing that is done with it changes it.

    Examples are whatever `read` takes: a path, a list of rows (dicts as in a file: text, messages, prompt and
    response, pairs of chosen and rejected ...; or strings), a `datasets.Dataset`, or examples that were read before.
    """

    folder: str
    """Where it was loaded from; its name in errors."""
    architecture: models.DecoderConfig
    decoder: models.Decoder
    """The functions of the model, for reading and generating."""
    tokenizer: Any
    params: Params
    """The parameters of the whole model, without adapters."""
    adapters: Params | None
    """LoRA factors on top of `params`, after a fine-tuning that trained them; None: none."""
    data: DataSection
    """How rows are read and become tokens: field names, max_length, truncation, template, train_on, packing."""
    remat: Remat
    """What backward passes compute again."""
    mesh: Mesh
    """The devices."""
    sharding_rules: sharding.ShardingRules
    """How parameters are split over them."""
    source_files: Mapping[str, bytes]
    """Files of the folder that a saved model takes along: tokenizer, chat template, config."""

    def __repr__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        adapters = ", with adapters" if self.adapters is not None else ""
        return f"LanguageModel({self.folder!r}, {self.architecture.family}, {count:,} parameters{adapters})"

    @property
    def joined_params(self) -> Params:
        """The parameters and the adapters as the decoder takes them."""
        return self.params if self.adapters is None else models.join_adapters(self.params, self.adapters)

    @property
    def merged_params(self) -> Params:
        """The parameters with the adapters added into them."""
        return self.params if self.adapters is None else models.merge_adapters(self.params, self.adapters)

    def read(self, examples: Any, data: DataSection | None = None, *, name: str = "examples") -> list[Example]:
        """The examples of a source, as all methods read them.

        Args:
            examples: a path, rows in memory, a `datasets.Dataset` or examples; see `lm.read_examples`.
            data: names of fields and the format of rows; default: those of the model.
            name: what rows in memory are called in errors.

        Returns:
            One example for each row, with an id by its content.

        Raises:
            ValueError: as `lm.read_examples`.

        Example:
            >>> rows = [{"question": "abcd>", "answer": "bcde"}]
            >>> [example] = lm.read(rows, bj.lm.DataSection(prompt_field="question", response_field="answer"))
            >>> example.turns[1].content
            'bcde'
        """
        return read_examples(examples, make_data_options(data or self.data), name=name)

    def finetune(
        self,
        examples: Any,
        validation: Any = None,
        optimizer: optax.GradientTransformation | None = None,
        *,
        steps: int,
        batch_size: int = 16,
        gradient_accumulation_steps: int = 1,
        lora: int | LoraSection = 0,
        objective: str | ObjectiveSection = "sft",
        target: Target = None,
        solver: str | None = "unroll",
        window: int | None = None,
        proximal: float = 0.0,
        curvature: Literal["gauss_newton", "hessian"] = "gauss_newton",
        linear_solver: LinearSolver | None = None,
        curvature_batches: int | None = None,
        memory_gib: float = 0.0,
        product_precision: ProductPrecision = "highest",
        leaks: Literal["error", "keep"] = "error",
        seed: int = 0,
        weights: Float[np.ndarray, "examples"] | Mapping[str, float] | None = None,
        certify: bool = False,
        throw: bool = True,
        progress: bool = False,
    ) -> FineTuned:
        """Train on weighted examples, and differentiate the validation loss by the weight of every example.

            theta_T(w): `steps` steps of the optimizer on sum_i w_i loss_i / (examples of the step) + the prior
            hypergradient_i = d L_v(theta(w)) / d w_i, nats; below 0 where more weight on example i lowers L_v

        The prior is (proximal / 2) |theta - theta_0|^2, centred at the start of training; under LoRA at the fresh
        factors. Equal numbers give `bilevel-jax select` and `core`: data orders, batches and losses are theirs.

        Args:
            examples: the training examples, which get weights.
            validation: trusted examples, whose mean loss is L_v; not needed with solver=None.
            optimizer: any chain of optax with a derivative; default optax.adamw(1e-4, eps_root=1e-12). Adam and its kin
                need eps_root > 0.
            steps: of the optimizer.
            batch_size: examples of a step, over all devices.
            gradient_accumulation_steps: parts that a step is computed in: less memory, the same gradient.
            lora: rank of low-rank adapters to train in place of all parameters, or a `LoraSection`; 0: all parameters.
                Adapters that the model has already are merged first.
            objective: "sft"; "dpo" and "simpo" for preference pairs; or an `ObjectiveSection` with beta and more. The
                reference of dpo is this model.
            target: what the validation examples judge by, where it is not the objective: "sft", "dpo", "simpo"; a
                function of the decoder that gives (params, batch) -> a loss for each example, as `lm.sft_losses` does;
                without validation, a function of the parameters alone that gives a number; several of them as {source
                of the examples: (factor, loss)}, of which "parameters" reads no examples; or a `TargetSection`.
            solver: "unroll": exact through the whole run, or its last `window` steps. "implicit": of the minimizer of
                the training loss with the prior, at the end of the run. "alignment": -<grad loss_i, grad L_v> / N
                there, a baseline. None: train alone.
            window: of "unroll": training steps that are differentiated; default all.
            proximal: delta of the prior, nats per squared unit of the parameters; "implicit" needs it above 0.
            curvature: of "implicit": "gauss_newton", positive semi-definite, or "hessian".
            linear_solver: of "implicit": as bj.solvers.cg(), the default with tolerance 1e-4 and at most 100 products.
            curvature_batches: of "implicit": batches of the first solve, doubled until the solution stays; default all.
            memory_gib: of "unroll": memory for stored states; 0: half of what the model leaves.
            product_precision: of "unroll": "highest", "high" or "default", of the matrix products in the steps back,
                as of `bj.unroll`; with `certify`, `certificates.checks.product_error` tells what it changes.
            leaks: what becomes of training examples that say the same as a validation example, whose weights would be
                rewarded for being copied: "error", or "keep" them.
            seed: of the data order and of fresh adapters.
            weights: one for each example, as an array or by id; default 1.
            certify: whether to check the hypergradient by retraining, with a verdict: 10 to 20 further runs.
            throw: whether a hypergradient that is not finite, whose linear system is not solved, or, with the Hessian,
                of a training that is not at its end, is an error; False: `status` says so.
            progress: whether to show a bar.

        Returns:
            The trained model, L_v, the hypergradients, checks and status.

        Raises:
            ValueError: bad arguments; examples that cannot be read or do not fit the objective; an optimizer without
                a usable derivative.
            FloatingPointError: a loss or parameter that is not finite, with the step and the rows; with `throw`, a
                status that is not OK.

        Example:
            >>> result = lm.finetune(rows, held_out, optax.adamw(1e-2, eps_root=1e-12), steps=4, batch_size=4)
            >>> result.status.name, len(result.hypergradients), result.lm
            ('OK', 8, LanguageModel(..., 768 parameters))

            Validation examples that judge by another loss than that of training, here the log-probability of a whole
            response:

            >>> def response_losses(decoder):
            ...     log_likelihoods = bj.lm.sequence_log_likelihoods(decoder)
            ...     return lambda params, batch: -log_likelihoods(params, batch)
            >>> optimizer = optax.adamw(1e-2, eps_root=1e-12)
            >>> judged = lm.finetune(rows, held_out, optimizer, steps=4, batch_size=4, target=response_losses)
            >>> judged.value > result.value  # a sum over tokens, and not their mean
            True
        """
        tuning = finetuning.prepare(
            self,
            examples,
            validation,
            optimizer,
            steps=steps,
            batch_size=batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            lora=lora,
            objective=objective,
            target=target,
            solver=SolverOptions(
                solver, window, proximal, curvature, linear_solver, curvature_batches, memory_gib, product_precision
            ),
            leaks=leaks,
            seed=seed,
        )
        return tuning.run(weights, with_certificates=certify, throw=throw, progress=progress)

    def generate(
        self,
        prompts: Any,
        *,
        max_new_tokens: int = 256,
        num_generations: int = 1,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        max_batch_tokens: int = 8192,
        progress: bool = False,
    ) -> list[list[Response]]:
        """Responses to prompts, by sampling.

        Token t of a draw depends on (seed, prompt, draw, t) alone: neither other prompts nor their order change it.
        Where the tokenizer has no chat template, prompt and response are joined as in training, by data.template, which
        puts a new line between them: to go on with a text itself, load the model with
        data=DataSection(template="{prompt}{response}").

        Args:
            prompts: strings; lists of messages, as [{"role": "user", "content": "..."}]; or examples, whose last
                response is generated anew.
            max_new_tokens: tokens of a response at most, with its end token.
            num_generations: responses to each prompt.
            temperature: 0: greedy; then all responses to a prompt are the same.
            top_k: only the k most probable tokens; 0: all.
            top_p: only the most probable tokens that together reach this probability; 1: all.
            seed: of the draws.
            max_batch_tokens: tokens of a batch, with padding: this bounds the memory.
            progress: whether to show a bar.

        Returns:
            [prompt][draw] -> response, with `text`, `tokens`, `log_probs` and `ended`.

        Raises:
            ValueError: prompts that are none, or that leave no room for the response in the model's context.

        Example:
            >>> [[response]] = lm.generate(["abcd>"], max_new_tokens=5, temperature=0)
            >>> len(response.tokens) <= 5
            True
        """
        sampling = SamplingParams(temperature, top_k, top_p, max_new_tokens, seed)
        return inference.generate(
            self, prompts, sampling, num_generations, max_batch_tokens=max_batch_tokens, progress=progress
        )

    def loglik(self, prompts: Any, responses: Sequence[str], *, progress: bool = False) -> LogLiks:
        """log p(response | prompt) of each pair, nats, summed over the tokens of the response, its end token included.

        The tokens are those of training, so that -nats / num_tokens is the loss of the pair as an example.

        Args:
            prompts: strings or lists of messages.
            responses: as many strings.
            progress: whether to show a bar.

        Returns:
            Nats and numbers of tokens, an array each.

        Raises:
            ValueError: another number of responses than prompts, or a pair that is longer than the model's context.

        Example:
            >>> logliks = lm.loglik(["abcd>"], ["bcde"])
            >>> logliks.nats.shape, logliks.num_tokens.tolist()  # four letters and the end token
            ((1,), [5])
        """
        return inference.loglik(self, prompts, responses, progress=progress)

    def score(
        self,
        name: str,
        examples: Any,
        holdout: Any = None,
        *,
        k: int | None = None,
        demonstrations: str = "knn",
        demonstration_sets: int = 1,
        embedding: Literal["tfidf", "hidden", "file"] = "tfidf",
        embedding_file: str = "",
        per_token: bool = True,
        max_similarity: float = 0.95,
        template: str = "",
        demonstration_template: str = "",
        anchors: int = 32,
        objective: str | ObjectiveSection = "sft",
        batch_size: int = 16,
        holdout_model: "LanguageModel | None" = None,
        own_answers: Mapping[str, str] | None = None,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        seed: int = 0,
        progress: bool = False,
    ) -> Scores:
        """A data score of each example by this model; larger is better.

        Args:
            name: a key of `language_model.scoring.SCORES`. Of the example alone: "loss", "perplexity", "ifd", "margin"
                (EL2N), "random". With a holdout: "ica", "oneshot", "alignment". With a model trained on the holdout:
                "reducible" (RHO-loss). With answers of the model's own: "sppl" and "self_similarity". Formulas and
                sources: `bj.scores`.
            examples: what is scored.
            holdout: trusted examples, for the scores that compare with them.
            k: demonstrations of ica (default 3), own answers shown by sppl (default 2).
            demonstrations: of ica: knn, clustered:K, fixed or random.
            demonstration_sets: of ica: disjoint sets of k demonstrations; scores are means over them, with
                `standard_errors`.
            embedding: of ica: vectors by which demonstrations are near: of words, of hidden states, or of a file.
            embedding_file: of ica, with embedding="file": parquet or JSON lines with an `id` and an `embedding`, a list
                of numbers, for each example and each of the holdout.
            per_token: of ica: mean over tokens, or sum.
            max_similarity: of ica and oneshot: cosine from which two questions are never shown to each other.
            template: of ica and oneshot: text with {demonstrations} and {row}; of sppl: text with {question} and
                {examples}; default: the usual one.
            demonstration_template: of ica and oneshot: text with {demonstration} around each; of sppl: with {answer}.
            anchors: of oneshot: holdout examples that judge.
            objective: of margin and alignment: as of `finetune`.
            batch_size: of margin and alignment.
            holdout_model: of reducible: this model after `lm.finetune(holdout, ..., solver=None).lm`.
            own_answers: of sppl and self_similarity: question -> the model's own answer; default: they are generated.
            max_new_tokens: of own answers that are generated.
            temperature: of own answers that are generated.
            seed: of random demonstrations, anchors, own answers and "random".
            progress: whether to show a bar.

        Returns:
            Values, ids and notes, such as examples with fewer demonstrations than wanted.

        Raises:
            ValueError: no such score, an argument that it does not read, or one that it lacks.
            FloatingPointError: no example has a finite score.

        Example:
            >>> scores = lm.score("perplexity", rows)
            >>> scores.values.shape, bool((scores.values <= -1).all())
            ((8,), True)
        """
        options = scoring.ScoreOptions(
            k=k,
            demonstrations=demonstrations,
            demonstration_sets=demonstration_sets,
            embedding=embedding,
            embedding_file=embedding_file,
            per_token=per_token,
            max_similarity=max_similarity,
            template=template,
            demonstration_template=demonstration_template,
            anchors=anchors,
            objective=objective,
            batch_size=batch_size,
            holdout_model=holdout_model,
            own_answers=own_answers,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
        return scoring.score(self, name, examples, holdout, options, progress=progress)

    def save(self, folder: str | Path) -> None:
        """Write a folder that `load` and transformers read; adapters are merged into the parameters.

        Args:
            folder: is created; empty where it exists.

        Raises:
            FileExistsError: `folder` holds something.

        Example:
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     lm.save(f"{folder}/model")
            ...     again = bj.lm.load(f"{folder}/model")
            >>> float(again.loglik(["ab>"], ["bc"]).nats[0] - lm.loglik(["ab>"], ["bc"]).nats[0])
            0.0
        """
        models.save_model(folder, self.architecture, self.merged_params, source_files=self.source_files)


def load(
    folder: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: Dtype = "float32",
    data: DataSection = DataSection(),  # noqa: B008 (frozen)
    remat: Remat = "selective",
    mesh: MeshSection = MeshSection(data=1),  # noqa: B008 (frozen)
) -> LanguageModel:
    """The model in a Hugging Face folder or on the hub: parameters, tokenizer and config.

    Args:
        folder: with config.json, safetensors files and a tokenizer; a name on the hub, owner/name or
            owner/name@revision, which is fetched into its cache; or builtin:cipher, builtin:sums, builtin:scripts
            or builtin:sources, the small models that the package makes itself, in some seconds to minutes.
        adapter: a PEFT folder of LoRA factors for it.
        dtype: of the parameters: float32; bfloat16, for a base that adapters are trained over; or float64, which needs
            jax.config.update("jax_enable_x64", True).
        data: how rows are read and become tokens: field names, max_length, truncation, template, train_on, packing.
        remat: what backward passes compute again to save memory: full (whole layers), selective (cheap parts), none.
        mesh: the devices; default one. MeshSection(data=0) takes all.

    Returns:
        The model.

    Raises:
        FileNotFoundError: no such folder, or a file that it lacks.
        ValueError: an unsupported architecture, damaged or unfitting files, a tokenizer of another model.

    Example:
        >>> import tempfile
        >>> from bilevel_jax.lm.builtin import cipher
        >>> from bilevel_jax.lm import models
        >>> config = models.read_config(cipher.make_cipher_config())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     params = models.init_params(config, jax.random.key(0))
        ...     bj.lm.save_model(f"{folder}/model", config, params, tokenizer=cipher.make_cipher_tokenizer())
        ...     model = bj.lm.load(f"{folder}/model")
        >>> sum(leaf.size for leaf in jax.tree.leaves(model.params))
        21952
    """
    if str(folder).startswith(BUILTIN_PREFIX):
        with tempfile.TemporaryDirectory() as made:
            model = load(
                _make_builtin(str(folder), Path(made)), adapter=adapter, dtype=dtype, data=data, remat=remat, mesh=mesh
            )
            return dataclasses.replace(model, folder=str(folder))
    if dtype not in ("float32", "float64", "bfloat16"):
        raise ValueError(f"dtype is {dtype!r}; it is float32, bfloat16 or float64.")
    if dtype == "float64" and jnp.result_type(float) != jnp.float64:
        raise ValueError('dtype is float64, which JAX leaves off: jax.config.update("jax_enable_x64", True) first.')
    if data.train or data.validation or data.dev or data.test or data.streaming:
        raise ValueError(
            "the data section of a model says how rows are read, and names files (train, validation, dev, test) or "
            "streaming. Give examples to the methods: lm.finetune(examples, validation, ...)."
        )
    devices = make_mesh(mesh.data, mesh.fsdp)
    rules = sharding.parse_sharding_rules(mesh.sharding_rules, devices)
    models.read_config(folder)  # before the tokenizer, which has no words for a folder that is none
    tokenizer = tokens.load_tokenizer(folder)
    architecture, params = models.load_model(
        folder, dtype=jnp.dtype(dtype), place=sharding.parameter_placer(devices, rules)
    )
    check_special_tokens(str(folder), tokenizer, architecture.vocab_size)
    adapters = None if adapter is None else models.load_peft(adapter, architecture, dtype=_adapter_dtype(dtype))
    return LanguageModel(
        str(folder),
        architecture,
        models.make_decoder(architecture, remat="none", gather_params=sharding.parameter_gatherer(devices, rules)),
        tokenizer,
        params,
        None if adapters is None else sharding.shard_tree(devices, rules, adapters),
        data,
        remat,
        devices,
        rules,
        models.read_source_files(folder),
    )


def builtin_rows(
    name: str, part: str = "train", *, seed: int = 0, sizes: Mapping[str, int] = {}
) -> list[dict[str, Any]]:  # noqa: B006
    """Rows of a built-in task, whose truth is known: what `load("builtin:NAME")` can learn.

    Args:
        name: cipher, sums or scripts.
        part: train, validation, dev or test.
        seed: another seed, other rows.
        sizes: what the task takes for its rows, as {"clean": 20, "wrong": 20} of the cipher or {"train": 40,
            "corrupted": 0.5} of sums and scripts; the rest as the task has it.

    Returns:
        Rows with prompt, response and label; of sums and scripts also answer, the right response. Of scripts with
        {"format": "pairs"}: chosen and rejected in place of response.

    Raises:
        ValueError: no such task or part, or sizes that the task does not take.

    Example:
        >>> rows = bj.lm.builtin_rows("cipher", sizes={"clean": 2, "wrong": 0, "noise": 0})
        >>> sorted(rows[0]), len(rows)
        (['label', 'prompt', 'response'], 2)
    """
    if name not in BUILTIN_TASKS:
        raise ValueError(f"there is no built-in task {name!r}; there are {list(BUILTIN_TASKS)}.")
    if part not in (parts := ("train", "validation", "dev", "test")):
        raise ValueError(f"there is no part {part!r} of a built-in task; there are {list(parts)}.")
    write_files = BUILTIN_TASKS[name].write_files
    options = sorted(inspect.signature(write_files).parameters.keys() - {"folder", "seed"})
    if unknown := sorted(set(sizes) - set(options)):
        raise ValueError(f"sizes: {name} has no {unknown[0]!r}; it takes {', '.join(options)}.")
    with tempfile.TemporaryDirectory() as folder:
        path = write_files(Path(folder), seed=seed, **sizes) / f"{part}.jsonl"
        if not path.exists():
            return []  # a file of 0 examples is not written
        return [row for _, row in files.read_rows(str(path))]


def _adapter_dtype(dtype: str) -> Any:
    """Adapters over a base in bfloat16 are float32."""
    return jnp.dtype("float32" if dtype == "bfloat16" else dtype)


def _make_builtin(name: str, folder: Path) -> Path:
    """The folder of a built-in model, taught what its task takes for granted."""
    task = BUILTIN_TASKS.get(name.removeprefix(BUILTIN_PREFIX))
    if task is None:
        raise ValueError(f"{name} is no built-in model; they are {[BUILTIN_PREFIX + one for one in BUILTIN_TASKS]}.")
    task.write_files(folder, seed=0)
    pretrain_builtin_model(folder, task, progress=False)
    return folder / "model"
