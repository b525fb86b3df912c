"""Config sections, with type, bounds, default and meaning of each key"""

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from annotated_types import Ge, Gt, Interval, MinLen

from bilevel_jax.runs.config.bounds import Because, Required, Special, Unique

ExampleFormat = Literal[
    "auto", "text", "chat", "sharegpt", "prompt", "completion", "alpaca",
    "preference", "implicit_preference", "alpaca_preference", "sharegpt_preference", "hh",
]  # fmt: skip
ScoreName = Literal["", "ica", "perplexity", "loss", "reducible", "oneshot", "alignment", "margin", "random"]
FeatureName = Literal[
    "length", "kind", "source", "tokens", "likeness", "loss", "margin", "hidden", "hidden_likeness", "validation_loss",
    "reducible", "uniform_loss", "embedding", "embedding_likeness", "columns",
]  # fmt: skip
OuterMethod = Literal["unrolled", "implicit", "window", "alignment", "penalty", "bmo", "mixing"]
OuterEstimate = Literal["per_example", "pooled", "auto"]
SINGLE_LOOP_METHODS = ("penalty", "bmo", "mixing")
LossReduction = Literal["example_mean", "token_sum", "token_mean"]
Remat = Literal["full", "selective", "none"]

Count = Annotated[int, Ge(1)]
MAX_STEPS = 10_000_000
"""Most optimizer steps of a run that is differentiated: more take longer to plan than anyone waits."""
Seed = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Interval(gt=0, le=1)]
OpenShare = Annotated[float, Interval(gt=0, lt=1)]
Decay = Annotated[float, Interval(ge=0, lt=1)]


@dataclass(frozen=True)
class ModelSection:
    """The language model."""

    name_or_path: str = ""
    """Folder of a Hugging Face checkpoint, owner/name@revision on the hub, or builtin:cipher, :sums or :scripts."""

    from_scratch: bool = False
    """Train from random parameters, drawn for each seed, instead of the checkpoint's."""

    base_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage type of frozen base parameters under LoRA; computation converts them to param_dtype layer by layer."""

    param_dtype: Literal["float32", "float64"] = "float32"
    """Type of the trained parameters, the optimizer state and the hypergradients."""

    remat: Remat = "selective"
    """Activations that backward passes recompute to save memory: full (whole layers), selective (cheap parts), none."""


@dataclass(frozen=True)
class LoraSection:
    """Low-rank adaptation (LoRA): trains small adapters of a frozen base model."""

    r: Annotated[int, Ge(0), Special(0, "train all parameters")] = 16
    """Rank of the adapters; 0 trains all parameters instead."""

    alpha: Positive = 16.0
    """Scale of the adapters: their product is multiplied by alpha / r."""

    target_modules: tuple[str, ...] = ()
    """Names of the projections that get adapters; empty: those usual for the model family."""


@dataclass(frozen=True)
class DataSection:
    """Training and validation examples, and how they are read."""

    train: tuple[str, ...] = ()
    """Training examples: files (jsonl, json, parquet) or the name of a dataset."""

    validation: tuple[str, ...] = ()
    """Trusted examples that the weights are learned from; data.split divides them into validation, dev and test."""

    dev: tuple[str, ...] = ()
    """Separate examples for early stopping and model choice; empty: a part of data.validation."""

    test: tuple[str, ...] = ()
    """Separate examples for the final evaluation; empty: a part of data.validation. evaluate: the prompts."""

    split: tuple[float, float, float] = (0.5, 0.25, 0.25)
    """Fractions of data.validation that become validation, dev and test; the split goes by example id."""

    format: ExampleFormat = "auto"
    """Format of an example; auto detects it from the keys of each example."""

    prompt_field: str = "prompt"
    """Key of the prompt."""

    response_field: str = "response"
    """Key of the response, whose tokens have the loss."""

    text_field: str = "text"
    """Key of plain text, all of whose tokens have the loss."""

    messages_field: str = "messages"
    """Key of the messages of a conversation."""

    system_field: str = "system"
    """Key of the system prompt, where an example has one outside its messages."""

    chosen_field: str = "chosen"
    """Key of the preferred response of a preference pair."""

    rejected_field: str = "rejected"
    """Key of the rejected response of a preference pair."""

    source_field: str = "source"
    """Key of the source that an example comes from, used by outer.weighting per_source, raters and reports."""

    label_field: str = ""
    """Key of a known quality label, for AUC and the oracle in reports only; training never reads it."""

    good_label: str = "clean"
    """Value of data.label_field that marks a good example."""

    empty: Literal["error", "drop"] = "error"
    """Examples with an empty prompt or response: error (stop and list them) or drop."""

    template: str = ""
    """Text with {prompt} and {response} for tokenizers without a chat template."""

    max_length: Annotated[int, Ge(2)] = 1024
    """Maximum number of tokens of an example."""

    truncation: Literal["error", "right", "left", "drop"] = "error"
    """Examples longer than max_length: error (stop and list them), cut on the right or left, or drop."""

    train_on: Literal["all_turns", "last_turn"] = "all_turns"
    """Assistant turns that have the loss; a message with weight 0 (or train, loss, trainable: false) has none."""

    packing: bool = False
    """Put several examples into one sequence: faster, with the same losses and gradients."""

    streaming: bool = False
    """Command `train`: read the training examples during training, for data that do not fit in memory."""

    shuffle_buffer: Annotated[int, Ge(0), Special(0, "keep the order")] = 10000
    """Size of the shuffle buffer under streaming, in examples; 0 keeps the order of the files."""

    leaks: Literal["error", "drop"] = "error"
    """Training examples that also occur in the validation, dev or test examples: error (stop and list them) or drop."""

    seed: Seed = 0
    """Seed of the split and of the order of the training examples."""


@dataclass(frozen=True)
class VerifierSection:
    """A verifier, which decides by a rule whether a generated response is correct."""

    name: str = ""
    """numeric, exact, choice, or path/to/file.py:function called with (question, answer, response); empty: none."""

    answer_field: str = ""
    """Key of the correct answer in an example; empty: the response of the example."""

    markers: tuple[str, ...] = ("####", "Final Answer:")
    """numeric, choice: texts that the answer follows in a response; without one the last number, or letter, counts."""


@dataclass(frozen=True)
class ObjectiveSection:
    """The training loss of one example."""

    name: Literal["sft", "dpo", "simpo"] = "sft"
    """sft (cross-entropy of the response), or dpo and simpo (preference losses of a chosen and a rejected response)."""

    reduction: LossReduction = "example_mean"
    """sft: mean over the tokens of each example, sum over them, or mean over all tokens of the batch."""

    beta: Annotated[float, Ge(0), Special(0, "the usual one")] = 0.0
    """dpo, simpo: inverse temperature of the preference loss; 0: the usual 0.1 of DPO and 2.5 of SimPO."""

    gamma_ratio: NonNegative = 0.55
    """simpo: target margin gamma / beta, in nats per token."""

    label_smoothing: float = 0.0
    """dpo: assumed share of pairs whose order is wrong, below 0.5."""

    reference: str = ""
    """dpo, in target.losses, too: reference.parquet of an earlier run; empty: the initial model is the reference, and
    reads all pairs once."""


@dataclass(frozen=True)
class TargetSection:
    """What the validation examples judge by, where it is another loss than that of training, or several at once."""

    losses: tuple[str, ...] = ()
    """sft, dpo, simpo or path/to/file.py:function, one for each target or one for all; empty: the training loss."""

    sources: Annotated[tuple[str, ...], Unique()] = ()
    """Sources of validation examples (data.source_field, or their file) that are a target each; parameters: a target
    without examples, a function of the parameters alone. Empty: all validation examples are one target."""

    coefficients: tuple[float, ...] = ()
    """Factor of each target's mean loss in the validation loss, as 0.7 0.3; 0: it judges nothing, and is reported on
    dev and test. Empty: equal ones that sum to 1."""

    beta: tuple[Annotated[float, Ge(0), Special(0, "that of the objective, or the usual one")], ...] = ()
    """dpo, simpo: inverse temperature, one for each target or one for all; 0, and where none is given: that of the
    objective where it has the same name, else 0.1 and 2.5."""

    gamma_ratio: tuple[Annotated[float, Ge(0), Special(-1, "that of the objective, or 0.55")], ...] = ()
    """simpo: margin gamma / beta, in nats per token, one for each target or one for all; -1, and where none is given:
    that of the objective where it is simpo, too, else 0.55."""


@dataclass(frozen=True)
class OptimizerSection:
    """The optimizer of the model's parameters, which hypergradients differentiate through."""

    name: Literal["sgd", "momentum", "adam", "adamw", "lion"] = "adamw"
    """The update rule; lion has derivative 0, so unrolled differentiation refuses it."""

    learning_rate: Positive = 1e-4
    """Peak learning rate; one that is too high makes exact hypergradients useless, which section certify measures."""

    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Learning rate after the warmup: constant, or decaying to 0 along a cosine or a line."""

    warmup_steps: Annotated[int, Ge(0)] = 10
    """Steps over which the learning rate rises to its peak."""

    warmup_ratio: Decay = 0.0
    """Warmup as a fraction of all steps; above 0 it replaces warmup_steps."""

    weight_decay: NonNegative = 0.0
    """Weight decay, decoupled for adamw and lion, added to the gradient (L2) for the others."""

    momentum: Decay = 0.9
    """Decay rate of the momentum optimizer."""

    b1: Decay = 0.9
    """Decay rate of the first moment (adam, adamw, lion)."""

    b2: Decay = 0.999
    """Decay rate of the second moment (adam, adamw, lion)."""

    eps: NonNegative = 1e-8
    """Constant added outside the square root (adam, adamw)."""

    eps_root: NonNegative = 1e-12
    """Constant added inside the square root; with 0 hypergradients are NaN where a gradient is 0. A larger one makes
    them less sensitive, and is another optimizer where single entries of gradients are below its root."""

    max_grad_norm: Annotated[float, Ge(0), Special(0, "no clipping")] = 0.0
    """Maximum norm of the gradient; 0: no clipping."""


@dataclass(frozen=True)
class TrainSection:
    """One training run of the model; the outer loop repeats it."""

    max_steps: Annotated[int, Interval(ge=1, le=MAX_STEPS)] = 300
    """Optimizer steps of one run."""

    global_batch_size: Count = 16
    """Examples in one optimizer step, over all devices."""

    gradient_accumulation_steps: int = 1
    """Parts that a batch is computed in: less memory, the same gradient. It must divide global_batch_size."""

    seed: Seed = 0
    """Seed of the initial trainable parameters."""


@dataclass(frozen=True)
class FineTuneSection:
    """The training run."""

    num_epochs: Positive = 1.0
    """Passes over the training examples."""

    max_steps: Annotated[int, Ge(0), Special(0, "as many as train.num_epochs takes")] = 0
    """Optimizer steps; 0: as many as num_epochs takes."""

    global_batch_size: Count = 16
    """Examples in one optimizer step, over all devices."""

    gradient_accumulation_steps: int = 1
    """Parts that a batch is computed in: less memory, the same gradient. It must divide global_batch_size."""

    seed: Seed = 0
    """Seed of the initial trainable parameters."""

    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the inputs of matrix products; sums stay in float32."""

    eval_steps: Count = 50
    """Steps between evaluations of the validation loss; the start and the end are always evaluated."""

    load_best: bool = False
    """Write the parameters with the lowest dev loss instead of the last ones."""

    max_nonfinite_steps: Annotated[int, Ge(0), Special(0, "stop at the first")] = 0
    """Steps with a non-finite gradient that are skipped before the run stops."""


@dataclass(frozen=True)
class WeightsSection:
    """The weights of the training examples: from a file, from a score of the model, or constant."""

    score: ScoreName = ""
    """Data score that the model computes during training and that becomes the weights; see section scores."""

    refresh: Annotated[int, Ge(1), Special(1, "at the start only")] = 1
    """score: how many times it is computed, equally spaced over the run; 1: at the start only."""

    scaling: Literal["batch", "examples", "quantiles", "ranks"] = "batch"
    """score: weights from 0 to 1, by min-max over each batch or all examples (examples, quantiles), or by ranks."""

    quantile: Annotated[float, Interval(ge=0, lt=0.5)] = 0.05
    """scaling=quantiles: share of the examples at each end that gets weight 0 or 1."""

    file: str = ""
    """weights.parquet of `select`, or another parquet, jsonl or json file with an id per example."""

    column: str = "weight"
    """file: column that holds the weight, or a score where larger is better."""

    constant: Annotated[float, Gt(0), Because("with weight 0 nothing is learned")] = 1.0
    """Weight of every example where neither file nor score is given."""

    transform: Literal["none", "negate", "minmax", "rank"] = "none"
    """file: map from a score s to a weight: none, negate (-s), minmax ((s - min) / (max - min)), rank."""

    mean_one: bool = False
    """Divide the weights by their mean, so that the learning rate keeps its meaning."""

    tokens: str = ""
    """File with an id and token_weights, a list of factors of the losses of an example's targets, before truncation and
    with the end token; examples that it lacks have 1. They multiply the weights of the messages."""

    missing: Literal["error", "one", "zero", "drop"] = "error"
    """file: training examples whose id it lacks: error (stop and list them), weight one, weight zero, or drop."""


@dataclass(frozen=True)
class ScoreWeightsSection:
    """The map from the scores of refine.methods = ica to weights, which are then divided by their mean."""

    scaling: Literal["examples", "quantiles", "ranks"] = "examples"
    """Weights by min-max over all examples of the round (examples, quantiles), or by ranks."""

    quantile: Annotated[float, Interval(ge=0, lt=0.5)] = 0.05
    """scaling=quantiles: share of the examples at each end that gets the least or the largest weight."""


@dataclass(frozen=True)
class ScoresSection:
    """Data scores, which the model computes from training and validation examples; larger is better."""

    k: Count = 3
    """ica: validation examples shown as demonstrations before each training example."""

    demonstrations: str = "knn"
    """ica: choice of demonstrations: knn (nearest), clustered:K (of the example's cluster among K), fixed or random."""

    demonstration_sets: Count = 1
    """ica: disjoint sets of k demonstrations; scores are means over them, with standard errors in scores.parquet."""

    embedding: Literal["tfidf", "hidden", "file"] = "tfidf"
    """ica: vectors for nearness: tfidf (words), hidden (mean hidden states of the model) or those of embedding_file."""

    embedding_file: str = ""
    """embedding=file: file with an id and an embedding, a list of numbers, for each training and validation example."""

    per_token: bool = True
    """ica, oneshot: mean log-likelihood over the tokens of a response, as training losses are; false: the sum."""

    max_similarity: Annotated[float, Gt(0), Because("above 1 no two questions are too similar")] = 0.95
    """ica, oneshot: questions with a cosine similarity of this or more are never shown to each other."""

    template: str = ""
    """ica, oneshot: text with {demonstrations} and {row} that the prompt is built from."""

    demonstration_template: str = ""
    """ica, oneshot: text with {demonstration} around each demonstration."""

    anchors: Count = 32
    """oneshot: validation examples whose likelihood gain is measured, drawn once for all training examples."""

    seed: Seed = 0
    """Seed of random demonstrations, anchors, the holdout model and the score random."""

    holdout_steps: Annotated[int, Ge(0), Special(0, "as many as the run")] = 0
    """reducible: training steps of the holdout model on the validation examples; 0: as many as the run, the maximum."""


@dataclass(frozen=True)
class GenerateSection:
    """Generation of responses, by the model itself or by a server with the OpenAI-compatible API."""

    backend: Literal["embedded", "service"] = "embedded"
    """embedded (the model in this process) or service (the server at generate.url)."""

    num_generations: Count = 1
    """Responses to each prompt."""

    temperature: Annotated[float, Ge(0), Special(0, "greedy")] = 1.0
    """Sampling temperature; 0: greedy."""

    top_k: Annotated[int, Ge(0), Special(0, "all tokens")] = 0
    """Sample from the k most probable tokens; 0: all tokens."""

    top_p: Share = 1.0
    """Sample from the most probable tokens whose probabilities add up to this; 1: all tokens."""

    max_new_tokens: Count = 256
    """Maximum number of tokens of a response, with the end token."""

    seed: Seed = 0
    """Seed of the sampling."""

    max_batch_tokens: Count = 8192
    """embedded: tokens of a generation batch, prompts and responses with padding; bounds the memory."""

    url: str = ""
    """service: address up to /v1, as http://localhost:8000/v1."""

    model: str = ""
    """service: name of the model on the server."""

    api_key_env: str = "OPENAI_API_KEY"
    """service: environment variable that holds the API key; the key itself is never written."""

    concurrency: Count = 8
    """service: simultaneous requests."""

    timeout: Positive = 120.0
    """service: seconds for a whole answer until a request is repeated."""

    parameter_names: tuple[str, ...] = ()
    """service: other names of what is sent, as max_tokens=max_completion_tokens; seed= leaves the seed out."""


RefineMethod = Literal["unrolled", "penalty", "bmo", "mixing", "ica", "uniform"]


@dataclass(frozen=True)
class RefineSection:
    """Rounds of generating responses, training candidates with weights, and accepting the best if it improves."""

    rounds: Count = 3
    """Rounds; each generates responses, trains every candidate and tests the best one."""

    questions: Literal["fixed", "redrawn", "dynamic", "all", "none"] = "fixed"
    """Questions answered by the model: fixed (drawn once), redrawn (others each round), dynamic (lowest weights of the
    round), all, none."""

    share: Share = 0.1
    """fixed, redrawn, dynamic: share of the questions that are answered in a round."""

    generator: Literal["fixed", "reinforce"] = "fixed"
    """Model that answers: fixed (the present model as it is) or reinforce (one that is trained by its responses' exact
    hypergradients, section reinforce)."""

    methods: Annotated[tuple[RefineMethod, ...], MinLen(1), Unique()] = ("penalty",)
    """Methods that weight the examples; each trains one candidate per round. ica: by scores of the model that the round
    starts from (sections scores, weights). uniform: all weights 1."""

    keep_offline: bool = False
    """Keep the given response of an answered question in the training data, in addition to the generated ones."""

    ratio: Literal["token", "sequence", "none"] = "token"
    """Importance ratio in the losses of responses, per token or per sequence; bmo uses its own weights instead."""

    max_ratio: Annotated[float, Ge(1), Because("below it responses of the present model would lose their gradient")] = (
        10.0
    )
    """Upper clip of the importance ratio."""

    start_from: Literal["accepted", "first", "last"] = "accepted"
    """Model that candidates are trained from: the last accepted one, the first, or (reinforce) the student of the last
    round, accepted or not."""

    verifier_use: Literal["report", "filter"] = "report"
    """Use of the verifier: report its verdicts only, or filter wrong responses out of training."""

    level: Annotated[float, Interval(gt=0, le=0.5)] = 0.05
    """Significance level of accepting a candidate: one-sided paired bootstrap of the loss on dev."""

    bonferroni: bool = True
    """Divide the level by the number of tests (rounds times methods), so that it holds for the whole run."""


@dataclass(frozen=True)
class ReinforceSection:
    """Policy gradients of the generator, with refine.generator = reinforce: a response's reward is minus its exact
    hypergradient on the target (dataset policy gradient)."""

    model: str = ""
    """Another model that answers, with the same tokenizer; empty: it starts as the model itself."""

    reward: Literal["response", "token"] = "response"
    """Reward of a whole response, or of each token, which is then credited with its own and all later rewards."""

    advantages: Literal["group", "batch"] = "group"
    """Rewards less the mean of the other responses to the question, over their spread in the group or in the round."""

    learning_rate: Positive = 1e-5
    """Learning rate of the generator (Adam with b2 of .99)."""

    epochs: Positive = 1.0
    """Passes over a round's responses, in steps of train.global_batch_size."""

    max_ratio_change: Positive = 0.2
    """Clip of the probability ratio to the generator that answered, at 1 minus and 1 plus this."""

    kl_coefficient: NonNegative = 0.0
    """Factor of the divergence from the generator at its start, nats per token; 0: none."""

    reduction: Literal["token_sum", "example_mean"] = "token_sum"
    """Sum over the tokens of a response, the gradient of the expected reward, or their mean, which makes short
    responses of positive advantage and long ones of negative advantage likelier than that."""

    max_grad_norm: Annotated[float, Ge(0), Special(0, "no clipping")] = 1.0
    """Maximum norm of the policy gradient; 0: no clipping."""


@dataclass(frozen=True)
class OuterSection:
    """The outer loop, which learns the weights."""

    method: OuterMethod = "unrolled"
    """unrolled, implicit, window and alignment repeat training; for penalty, bmo, mixing see section single_loop."""

    weighting: Literal["softmax", "sigmoid", "per_source", "rater"] = "softmax"
    """Map from the learned logits to weights: softmax, sigmoid, one logit per source, or a function of features."""

    estimate: OuterEstimate = "per_example"
    """Step of the weights: the gradient of each example, what examples of like losses share of it (pooled), or both,
    each as far as two halves of the validation set and two trainings agree on it (auto)."""

    steps: Count = 8
    """Outer steps: each trains once and computes one hypergradient."""

    learning_rate: Positive = 0.7
    """Initial learning rate of the logits; the hypergradient is divided by its root mean square."""

    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate of the logits over the outer steps; cosine and linear decay to 0."""

    max_step: Positive = 2.0
    """Maximum change of a logit in one outer step."""

    restart: Literal["cold", "warm"] = "cold"
    """Parameters that each training starts from: the initial ones (cold) or the last ones (warm)."""

    reshuffle: bool = True
    """New order of the examples in each training, so that the weights do not overfit one order."""

    ess_floor: Decay = 0.1
    """Stop when the effective sample size of the weights falls below this share of the examples; in refine before."""

    patience: Annotated[int, Ge(0), Special(0, "never stop early")] = 3
    """Stop after this many outer steps without a lower dev loss; 0: never."""

    validation_folds: Annotated[int, Ge(0), Special(0, "validation judges only")] = 0
    """Also train on validation: its folds take turns to judge, the others train with one learned weight; 0: never."""

    reliability_every: Annotated[int, Ge(0), Special(0, "never")] = 2
    """Outer steps from one measurement of reliability (how far the hypergradient speaks for examples beside the
    validation set) to the next; the first and the last, too; in refine the last alone reads dev. 0: never."""

    reliability_floor: Annotated[float, Interval(ge=0, lt=1), Special(0, "never stop for it")] = 0.05
    """Stop where the reliability, in refine by halves of validation, was at most this twice in a row; 0: never."""

    window: Count = 20
    """method=window: number of last training steps that are differentiated."""

    memory_gib: Annotated[float, Ge(0), Special(0, "half of what the model leaves")] = 0.0
    """unrolled, window: device memory for stored training states; 0: half of what the model leaves free."""

    offload: Literal["device", "host", "disk"] = "device"
    """unrolled, window: where checkpoints of training are stored for the backward pass."""

    linearize: bool = False
    """unrolled, window: store linearized steps, a quarter less work in the backward pass for more memory."""

    product_precision: Literal["highest", "high", "default"] = "highest"
    """unrolled, window: precision of the matrix products in the steps back, for accelerators. Below the highest there
    is an error, which the first step and the certificates measure; training has the highest."""

    proximal: float = 0.0
    """Coefficient delta of the term delta/2 |params - initial|^2 in the training loss; implicit needs it above 0."""

    curvature: Literal["gauss_newton", "hessian"] = "gauss_newton"
    """implicit: matrix of the linear system."""

    solver: Literal["cg", "neumann", "dense", "identity"] = "cg"
    """implicit: solver of the linear system."""

    neumann_rate: Positive = 0.1
    """solver=neumann: step size, below 2 over the largest curvature."""

    tolerance: OpenShare = 1e-4
    """implicit: relative residual at which the solver stops."""

    max_iterations: Count = 100
    """implicit: maximum number of matrix-vector products."""

    curvature_batches: Count = 8
    """implicit: batches that estimate the matrix; doubled until the solution is stable."""

    warm_start: ScoreName = ""
    """Data score whose standardized values are the initial logits; empty: equal weights."""


@dataclass(frozen=True)
class RaterSection:
    """A rater (outer.weighting = rater): weights that are one function of features, for examples never seen, too."""

    features: Annotated[tuple[FeatureName, ...], MinLen(1), Unique()] = (
        "length", "loss", "validation_loss",
    )  # fmt: skip
    """Features of an example; commands/README.md says what each of them takes."""

    link: Literal["softmax", "sigmoid"] = "softmax"
    """Map from the logits to weights: softmax (mean 1) or sigmoid (between 0 and 2, with an intercept)."""

    transform: Literal["clip", "rank", "none"] = "clip"
    """Heavy tails: cut at the quantiles .01 and .99 of the training examples (clip), ranks among them, or none."""

    directions: Count = 8
    """Features hidden and embedding: principal directions of the hidden states, or of the vectors of embedding_file."""

    residual_scale: NonNegative = 0.0
    """Prior standard deviation of a logit of each example's own, which new examples do not have; 0: none."""

    folds: Annotated[int, Ge(0), Special(0, "off")] = 0
    """Intervals of the coefficients: loops without one of so many parts of validation, 2 or more; 0: off."""

    file: str = ""
    """Feature columns: file with an id for each example and columns of your own, or scores.parquet of a run."""

    columns: Annotated[tuple[str, ...], Unique()] = ()
    """Feature columns: columns of rater.file that are features."""

    embedding_file: str = ""
    """Features embedding and embedding_likeness: file with an id and an embedding, a list of numbers, for each training
    example; for the second, each validation example, too."""

    batch_tokens: Count = 8192
    """Tokens in one forward pass for features, over all devices."""


@dataclass(frozen=True)
class SingleLoopSection:
    """Single-loop methods penalty, bmo and mixing, which train parameters and weights together in one run."""

    steps: Annotated[int, Ge(0), Special(0, "train.max_steps * outer.steps")] = 0
    """Steps of the run; 0: train.max_steps * outer.steps."""

    validation_shares: Annotated[
        tuple[Share, ...], MinLen(1), Because("the share of the validation loss; at 1 it is trained on alone")
    ] = (0.5, 0.4, 0.3)
    """Share of the validation loss in the total loss, one for each of as many equal parts of the run."""

    second_model: Literal["copy", "none"] = "copy"
    """penalty: also train a copy of the model on the weighted training loss alone, or not."""

    temperatures: tuple[Positive, Positive] = (1.0, 0.1)
    """bmo: temperature of the weights at the first and the last step, geometric in between."""

    min_effective_share: Annotated[float, Interval(ge=0, lt=1), Special(0, "no floor")] = 0.2
    """bmo: least effective sample size of the weights, as a share of the training examples; where they have less, the
    temperature is raised. 0: no floor."""

    reference: Literal["none", "snapshot", "copy"] = "none"
    """bmo: reference model that losses are compared with: none, the initial model, or a trained copy."""

    inner_steps: Count = 1
    """bmo, reference=copy: training steps of the copy per step of the model."""

    proximal: Positive = 1.0
    """bmo, reference=copy: coefficient of the proximal term that keeps the copy near the model."""

    eval_steps: Count = 50
    """Steps between evaluations of the validation, dev and test losses."""


@dataclass(frozen=True)
class OutputSection:
    """The output folder."""

    dir: Annotated[str, Required("name the run's folder")] = "out"
    """Folder of the run, here or at s3:// or gs://; an existing run is never overwritten."""

    resume: bool = False
    """Continue the run in that folder."""

    progress: bool = True
    """Show a progress bar."""

    tensorboard: bool = False
    """Write the log's numbers and histograms of learned weights for TensorBoard: event files in DIR/tensorboard."""

    save_minutes: Positive = 10.0
    """Minutes between checkpoints."""


@dataclass(frozen=True)
class TrainOutputSection:
    """The output folder and the form of the trained model."""

    dir: Annotated[str, Required("name the run's folder")] = "out"
    """Folder of the run, here or at s3:// or gs://; an existing run is never overwritten."""

    resume: bool = False
    """Continue the run in that folder."""

    progress: bool = True
    """Show a progress bar."""

    tensorboard: bool = False
    """Write the log's numbers and histograms of learned weights for TensorBoard: event files in DIR/tensorboard."""

    save_minutes: Positive = 10.0
    """Minutes between checkpoints."""

    model: Literal["full", "adapter", "both"] = "both"
    """LoRA: write the merged model, the PEFT adapter, or both."""


@dataclass(frozen=True)
class SelectionSection:
    """The subset of training examples that is selected by weight."""

    top_share: Share = 0.8
    """Share of the examples with the highest weights."""

    threshold: Annotated[float, Ge(0), Special(0, "off")] = 0.0
    """Instead of top_share: minimum weight, where the mean weight is 1; 0: off."""

    resample: Annotated[int, Ge(0), Special(0, "off")] = 0
    """Instead of top_share: number of examples drawn in proportion to weight, with whole repeats; 0: off."""

    max_repeats: Annotated[int, Ge(0), Special(0, "no cap")] = 0
    """Most times that resample takes one example, the others taking its rest in proportion; 0: no cap.

    Language models gain nearly as much from up to 4 epochs over the same data as from new data, and ever less from more
    (Muennighoff et al., arXiv 2305.16264)."""

    per_source: Annotated[int, Ge(0), Special(0, "off")] = 0
    """Instead of top_share: number of examples, divided over sources by total weight, highest first; 0: off."""

    strata: Literal["", "length", "loss"] = ""
    """Take top_share of each of num_strata groups of like length in tokens, or of like loss before training, and not of
    all examples together, so that long or hard ones are no larger part of the selection; empty: off.

    Examples of equal length, or equal loss, are in one group, whatever their order."""

    num_strata: Annotated[int, Ge(2)] = 5
    """strata: groups of the examples, in order of length or loss, of as equal numbers as equal values allow; fewer
    groups where too many are equal, which is told. The selection must have a row for each."""


Variant = Literal[
    "uniform", "learned", "learned+validation", "selected", "random", "top_alignment", "low_loss", "low_loss_dev",
    "validation", "validation_early_stop", "validation_model", "train+validation", "oracle",
    "ica", "loss", "reducible", "oneshot", "margin",
]  # fmt: skip
DEFAULT_VARIANTS: tuple[Variant, ...] = get_args(Variant)[:13]
"""All variants but the data scores that cost a pass of their own over the examples."""


@dataclass(frozen=True)
class ContradictionsSection:
    """Validation examples whose loss rises when the others choose the training weights: wrong labels, another task."""

    draws: Annotated[int, Ge(2), Special(0, "not measured")] = 0
    """Divisions of validation into parts, 4 say; in each, every example is read after a training whose weights the
    other parts chose. A draw costs the hypergradients of all parts, side by side, and a training for each part and
    one; 0: not measured."""

    folds: Annotated[int, Ge(2)] = 4
    """Parts of validation, of two examples or more."""

    action: Literal["report", "drop"] = "report"
    """What is done with such examples: they are named in the report and in validation.parquet (report), or do not
    steer the weights, too (drop). Read before you drop: a rare kind of example contradicts as a wrong one does."""


@dataclass(frozen=True)
class RetrainSection:
    """Comparison of final weights with simple alternatives, by retraining and evaluating on test."""

    enabled: bool = True
    """Run the comparison; it costs one training for each variant and seed."""

    seeds: Annotated[int, Ge(1)] = 3
    """Trainings of each variant, with different seeds."""

    variants: tuple[Variant, ...] = DEFAULT_VARIANTS
    """Variants that are trained; a data score: its highest values; low_loss_dev, validation_*: chosen on dev."""


@dataclass(frozen=True)
class CertifySection:
    """Checks that the hypergradient is exact, smooth and predictive, with a verdict."""

    enabled: bool = True
    """Run the checks; they cost two trainings per step size and one, and a hypergradient with its training for each of
    certify.draws of each share of certify.removed."""

    step_sizes: Annotated[tuple[OpenShare, ...], MinLen(1)] = (0.1, 0.03, 0.01, 0.003)
    """Exactness: step sizes of the finite differences along the sign of the hypergradient."""

    removed: Annotated[tuple[OpenShare, ...], MinLen(1)] = (0.5, 0.2)
    """Smoothness (metasmoothness): shares of the training examples whose removal is tested, the largest first; a
    smaller one is tested only where the larger ones are not smooth, a half only at nearly uniform weights. A verdict
    speaks of changes up to the largest."""

    draws: Annotated[int, Ge(1)] = 3
    """Smoothness: random choices of examples for each share, whose mean is judged."""

    retrains: Annotated[int, Ge(8), Special(0, "not measured"), Because("fewer say nothing about a correlation")] = 0
    """Predictiveness: trainings without random subsets of the examples; 0: not measured."""

    retrain_removed: OpenShare = 0.5
    """Predictiveness: share of the training examples that each of those trainings leaves out."""


@dataclass(frozen=True)
class TuneSection:
    """The settings of training that are tried for one whose certificates hold."""

    learning_rates: Annotated[tuple[Positive, ...], Unique()] = (0.7, 0.5, 0.35, 0.25, 0.12, 0.06, 0.03)
    """Factors of optimizer.learning_rate."""

    warmup_shares: Annotated[tuple[OpenShare, ...], Unique()] = (0.1, 0.3)
    """Values of optimizer.warmup_ratio; those that are no longer than the config's own warmup are passed over."""

    eps_roots: Annotated[tuple[Positive, ...], Unique()] = (1e-8, 1e-6)
    """Values of optimizer.eps_root, of adam and adamw; those below the config's own are passed over."""

    clip_norms: Annotated[tuple[NonNegative, ...], Unique()] = (1.0,)
    """Values of optimizer.max_grad_norm; 0: no clipping."""

    batch_sizes: Annotated[tuple[Annotated[int, Ge(2)], ...], Unique()] = (2, 4)
    """Factors of train.global_batch_size, in as many more parts (gradient_accumulation_steps), so that they need no
    more memory; each costs as many times more per step, in every later training, too."""

    activations: Annotated[tuple[Literal["relu", "gelu", "silu", "tanh"], ...], Unique()] = ("gelu", "tanh")
    """Values of arrays.activation, where there are hidden layers; a language model has that of its checkpoint."""

    command: Literal["auto", "select", "audit"] = "auto"
    """Command that tuned.yaml is written for; auto: audit for arrays, and where section audit has a value that is not
    its default, else select."""

    budget: Count = 400
    """Work at most, in trainings of the config's own length; its own certificates are always computed."""

    max_loss_increase: NonNegative = 0.05
    """How much higher than the config's own a loss may be, as a share of it, on dev, or on validation without dev."""


@dataclass(frozen=True)
class MeshSection:
    """The device mesh: data x fsdp devices, in one process or several."""

    data: Annotated[int, Ge(0), Special(0, "all devices")] = 0
    """Data-parallel replicas of the parameters; 0: as many as all devices allow."""

    fsdp: Annotated[int, Ge(1), Special(1, "every device has all parameters")] = 1
    """Devices that share one replica (fully sharded data parallelism): parameters are gathered layer by layer."""

    sharding_rules: tuple[str, ...] = ()
    """Sharding rules with precedence over the built-in ones, as 'layers/down_proj/kernel = - fsdp -'."""


@dataclass(frozen=True)
class DistributedSection:
    """Initialization of a run over several processes, as on several hosts."""

    coordinator_address: str = ""
    """host:port of the first process, or auto (TPU pods, SLURM, Open MPI, Kubernetes); empty: a single process."""

    num_processes: Annotated[int, Ge(0), Special(0, "detected")] = 0
    """Number of processes; 0: from JAX_NUM_PROCESSES or the cluster."""

    process_id: Annotated[int, Ge(-1), Special(-1, "detected")] = -1
    """Index of this process, from 0; -1: from JAX_PROCESS_ID or the cluster."""

    initialization_timeout: Count = 300
    """Seconds to wait at the start for the other processes."""


@dataclass(frozen=True)
class WatchSection:
    """What `watch` shows, and how often."""

    dir: Annotated[str, Required("name the folder of a run")] = ""
    """Folder of a run of any command, or its URL (s3://bucket/run)."""

    seconds: Positive = 2.0
    """Seconds between two drawings."""

    once: bool = False
    """Draw once and stop, as where the output is no terminal."""


@dataclass(frozen=True)
class ShowSection:
    """What `inspect` prints."""

    examples: Annotated[int, Ge(0), Special(0, "show none")] = 3
    """Examples shown token by token, the first ones of each part of the data; 0: none."""

    ids: tuple[str, ...] = ()
    """Ids of examples to show instead, as in weights.parquet."""

    max_tokens: Annotated[int, Ge(2)] = 300
    """Tokens shown of one example; a longer one loses its middle."""

    width: Annotated[int, Ge(40), Special(0, "the terminal's")] = 0
    """Characters in a line; 0: the width of the terminal."""


@dataclass(frozen=True)
class EstimateSection:
    """The machine that is estimated for, and how the estimate is made."""

    command: Literal["auto", "select", "train", "compare", "audit", "tune"] = "auto"
    """Command that the config is for; auto: detected from its sections."""

    devices: Annotated[int, Ge(0), Special(0, "those of this machine")] = 0
    """Devices of the run; more than this machine has are simulated for compilation; 0: those of this machine."""

    hosts: Annotated[int, Ge(1)] = 1
    """Hosts, a process each, that the devices are spread over evenly: what each reads and holds is estimated, too."""

    memory_gib: Annotated[float, Ge(0), Special(0, "that of this machine's devices")] = 0.0
    """Memory of one device; 0: that of this machine's devices."""

    train_examples: Annotated[int, Ge(0), Special(0, "read the data")] = 0
    """Number of training examples, each of data.max_length tokens, where the data are absent; 0: read the data."""

    validation_examples: Count = 256
    """Number of validation examples where train_examples is given."""

    compile: bool = True
    """Ask the compiler for its working memory; false: sizes of arrays only, in seconds."""

    measure: bool = True
    """Time a few steps on this machine, with random parameters, where they fit."""

    tflops: Annotated[float, Ge(0), Special(0, "time steps on this machine")] = 0.0
    """Peak speed of a device in 1e12 operations per second, for hours without timing steps; 0: time steps."""

    mfu: Share = 0.35
    """tflops: model FLOPs utilization, the share of the peak speed that training reaches."""

    dir: str = ""
    """Folder for estimate.json; empty: not written."""


@dataclass(frozen=True)
class ExportSection:
    """The files that `export` writes."""

    dir: Annotated[str, Required("name the folder to write")] = "out/export"
    """New folder for the files; never overwritten."""

    format: Literal["trl", "axolotl", "llama_factory", "llama_factory_v1", "maxtext", "openai"] = "trl"
    """Trainer or service whose input format is written; Tunix reads that of maxtext, Fireworks that of openai."""

    layout: Literal["auto", "chat", "prompt", "text", "preference"] = "auto"
    """Layout of an example; auto: that of the training examples."""

    container: Literal["jsonl", "json", "parquet", "datasets"] = "jsonl"
    """File format; datasets: a folder of `save_to_disk`."""

    weight_key: bool = True
    """Write the weight of each example as its `weight`, and in llama_factory_v1 as `loss_weight` of answers, too."""

    push_to_hub: str = ""
    """owner/name of a data set on the Hugging Face hub that the files are pushed to, with their card; empty: none."""

    push_model_to_hub: str = ""
    """owner/name that the run's model is pushed to, or its adapter, if the base has a name on the hub; empty: none."""

    private: bool = True
    """Repositories that are made on the hub are seen by their owner alone; false: by everybody."""

    replace: bool = False
    """Overwrite on the hub what no export of this run made, or was changed since; the history there keeps it."""


@dataclass(frozen=True)
class ArraysSection:
    """Classification with wrong labels (hyper-cleaning); data.train is one .npz: x_train, y_train, x_test, y_test."""

    hidden_sizes: tuple[Annotated[int, Ge(1)], ...] = ()
    """Widths of the hidden layers; empty: softmax regression."""

    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    """Of the hidden layers; with relu, that of the published protocol, the validation loss jumps as weights change."""

    train_examples: Annotated[int, Ge(2), Because("weights compare examples")] = 5000
    """Training examples, drawn from x_train for each seed."""

    validation_examples: Count = 500
    """Validation examples, drawn from the rest of x_train."""

    dev_examples: Annotated[int, Ge(0), Special(0, "none")] = 0
    """Dev examples, drawn from the rest of x_train; 0: none, so the last weights are used."""

    test_examples: Annotated[int, Ge(0), Special(0, "all of x_test")] = 0
    """Test examples, drawn from x_test; 0: all of x_test."""

    label_noise: Literal["forced", "redrawn", "shifted", "none"] = "forced"
    """Label noise: forced (a wrong class), redrawn (uniform over all classes), shifted (the next class), none."""

    noise_share: Annotated[float, Interval(ge=0, le=1)] = 0.5
    """Share of the training examples with noisy labels."""


CompareMethod = Literal[
    "unrolled", "pooled", "auto", "window", "implicit", "alignment", "penalty", "penalty_alone", "bmo", "mixing",
    "proxy_fit",
]  # fmt: skip
POOLED_METHODS = ("pooled", "auto")
"""Methods of compare that are `unrolled` with the outer.estimate of their name."""
Baseline = Literal[
    "uniform", "validation", "validation_early_stop", "train+validation", "oracle", "oracle+validation", "random",
    "top_alignment", "low_loss", "low_loss_dev", "validation_model", "stratified",
]  # fmt: skip
DEFAULT_BASELINES: tuple[Baseline, ...] = get_args(Baseline)[:-1]
"""All baselines but `stratified`, which text of several sources has in any case."""
SOURCE_BASELINES: tuple[Baseline, ...] = ("uniform", "stratified")
"""Baselines that text of several sources has in any case."""

ArmName = Literal[Baseline, CompareMethod]
"""What `compare` compares: a baseline or a method."""


@dataclass(frozen=True)
class CompareSection:
    """The methods and baselines that are compared, and their compute budget."""

    methods: Annotated[tuple[CompareMethod, ...], Unique()] = (
        "unrolled", "window", "implicit", "alignment", "penalty", "mixing",
    )  # fmt: skip
    """Methods that learn weights."""

    baselines: Annotated[tuple[Baseline, ...], Unique()] = DEFAULT_BASELINES
    """Baselines, which learn no weights; of text of several sources uniform and stratified (equal shares of the
    sources) in any case."""

    budget: Count = 2000
    """Compute budget of a method for one seed: forward and backward passes over one batch."""

    seeds: Annotated[int, Ge(1), Because("an interval needs 2")] = 3
    """Repetitions with other wrong labels, orders of the data and initial parameters."""

    top_share: Share = 0.5
    """Share of the examples that random, top_alignment and low_loss select; validation_model, where there is no dev."""

    proxy_runs: Annotated[int, Ge(4), Because("a regression needs several points")] = 16
    """proxy_fit: trainings on drawn mixtures of sources, over which the validation loss is fitted."""


EstimatorName = Literal["unrolled", "implicit", "alignment"]
EXACT_ESTIMATOR: Literal["unrolled"] = "unrolled"
"""The estimator whose hypergradients `audit` compares the other scores with."""
ScoreCheckpoint = Literal["start", "end"]


@dataclass(frozen=True)
class AuditSection:
    """The data scores that are tested, and the leave-k-out retraining that tests them."""

    estimators: tuple[EstimatorName, ...] = get_args(EstimatorName)
    """Hypergradient estimators, of the mean validation loss and of each query's own loss."""

    scores: tuple[str, ...] = ()
    """Data scores, as in weights.score; empty: all that the data allow."""

    checkpoints: Annotated[tuple[ScoreCheckpoint, ...], MinLen(1), Because("start, end, or both")] = get_args(
        ScoreCheckpoint
    )
    """Models that compute the data scores: before training (start) and after it (end)."""

    queries: Annotated[int, Ge(2), Special(0, "none")] = 8
    """Validation examples whose own losses are also predicted by the estimators; 0: none."""

    vmap_size: Count = 16
    """Queries in one backward pass, and retrains at once (vmap): more is faster and takes more memory."""

    removed: Annotated[tuple[OpenShare, ...], MinLen(1), Unique()] = (0.5, 0.05)
    """Shares of the training examples that retrains leave out; the verdict uses the first."""

    subsets: Annotated[int, Ge(8), Because("fewer say nothing about a correlation (40 give it to about .1)")] = 40
    """Retrains for each share, each without another random subset."""

    extremes: Annotated[tuple[OpenShare, ...], Unique()] = (0.01, 0.05)
    """Shares of the training examples, at least one example, that two retrains for each score leave out: those with the
    highest scores and those with the lowest, beside as many at random; empty: none."""

    token_examples: Annotated[int, Ge(0), Special(0, "none")] = 5
    """Examples from either end of the exact hypergradients that the report shows with a hypergradient for each token,
    by one more training and its backward pass; not for preference pairs; 0: none."""


@dataclass(frozen=True)
class ScoreSection:
    """The rater that `score` applies, and what it reads beside the examples."""

    rater: Annotated[str, Required("name the folder rater/ of a run of select with outer.weighting rater")] = ""
    """Folder of a rater: rater/ in the folder of a run of `select`."""

    model: str = ""
    """Folder of the model that makes the rater's features; empty: that of the rater's run."""

    file: str = ""
    """Where the rater reads columns of the user's own: file with an id and these columns for each example."""

    embedding_file: str = ""
    """Where the rater reads embeddings of the user's own: file with an id and an embedding for each example."""

    features: bool = False
    """Write the features into scores.parquet, too."""

    batch_tokens: Count = 8192
    """Tokens in one forward pass, over all devices of a process."""


CandidateStrategy = Literal["gold", "direct", "step_by_step", "concise", "rephrase", "own_style"]


@dataclass(frozen=True)
class CandidatesSection:
    """Responses that shipped strategies write to the questions of data.train; rank then compares the strategies."""

    strategies: Annotated[tuple[CandidateStrategy, ...], Unique()] = ()
    """gold (data.response_field as it is), direct (the question alone), step_by_step, concise, rephrase (gold in other
    words), own_style (gold in the style of the model's own answers); empty: data.train holds the responses."""

    model: str = ""
    """Who writes: folder of a model, or a service as NAME@http://localhost:8000/v1; empty: model.name_or_path."""

    questions: Annotated[int, Ge(0), Special(0, "as many as blocks and trial trainings take")] = 0
    """Questions that every strategy answers; 0: as many as blocks and trial trainings take."""

    temperature: Annotated[float, Ge(0), Special(0, "greedy")] = 0.7
    """Sampling temperature of the writer; 0: greedy."""

    top_p: Share = 1.0
    """Sample from the most probable tokens whose probabilities add up to this; 1: all tokens."""

    max_new_tokens: Count = 512
    """Maximum number of tokens of a response."""

    seed: Seed = 0
    """Seed of the sampling."""

    api_key_env: str = "OPENAI_API_KEY"
    """service: environment variable that holds the API key; the key itself is never written."""

    concurrency: Count = 8
    """service: simultaneous requests."""

    timeout: Positive = 120.0
    """service: seconds for a whole answer until a request is repeated."""

    parameter_names: tuple[str, ...] = ()
    """service: other names of what is sent, as max_tokens=max_completion_tokens; seed= leaves the seed out."""


RankMetric = Literal["sppl", "perplexity", "ifd", "self_similarity", "mix", "car"]


@dataclass(frozen=True)
class RankSection:
    """The response generation strategies that are compared, and the metrics."""

    responses_field: str = "responses"
    """Key of the map {strategy: response} of an example; without it each strategy has a file of its own."""

    strategies: tuple[str, ...] = ()
    """Strategies to compare; empty: all."""

    id_field: str = ""
    """One file per strategy: key that matches examples between the files; empty: the question."""

    reward_field: str = ""
    """car: key of the reward of each response, or of the map {strategy: reward}."""

    metrics: tuple[RankMetric, ...] = ()
    """Metrics to compute; empty: all, with car where there are rewards."""

    pick_by: RankMetric = "sppl"
    """Metric that picks the best strategy."""

    block_size: Annotated[int, Ge(2), Because("a spread takes many")] = 50
    """Questions of a block; demonstrations come from the model's answers within the same block."""

    num_blocks: Annotated[int, Ge(1), Because("a spread takes 2")] = 3
    """Disjoint blocks; fewer where there are not enough questions."""

    k: int = 2
    """sppl: own answers of the model shown before each question."""

    mean: Literal["arithmetic", "geometric", "trimmed"] = "arithmetic"
    """sppl, perplexity: mean over the questions of a block."""

    trim: Annotated[float, Interval(ge=0, lt=0.5)] = 0.1
    """mean=trimmed: share of the questions left out at each end."""

    beta: Annotated[float, Interval(ge=0, le=1), Special(-1, "by their spread")] = 0.5
    """mix: weight of perplexity against 1 - self_similarity; -1: from the spread of the two."""

    own_answers: str = ""
    """File of the model's own answers, with a question and a response per example; empty: generated."""

    answer_questions: Annotated[int, Ge(0)] = 500
    """sppl: where a verifier rejects too many own answers of a block, the most questions that are asked in all."""

    template: str = ""
    """sppl: text with {question} and {examples} that the prompt is built from."""

    example_template: str = ""
    """sppl: text with {answer} around each shown answer."""

    final_answer: str = "\n\nFinal Answer: "
    """sppl: text between a shown answer and its verifier.answer_field; empty: the latter is not shown."""

    max_question_tokens: Annotated[int, Ge(0), Special(0, "no limit")] = 0
    """Maximum number of tokens of a question; longer ones are counted and not used; 0: no limit."""

    max_response_tokens: Annotated[int, Ge(0), Special(0, "no limit")] = 0
    """Maximum number of tokens of a response; longer ones are counted and cut; 0: no limit."""

    accuracies: tuple[str, ...] = ()
    """Known accuracies to correlate with: name=number for each strategy, or a .json file."""

    train_examples: Annotated[int, Ge(0), Special(0, "off")] = 0
    """Trial trainings: responses of each strategy to train on, tested on data.validation; 0: off."""

    train_seeds: Annotated[int, Ge(1), Because("an interval needs 2")] = 3
    """Trial trainings of each strategy, with different seeds."""

    records: str = ""
    """Table to judge the metrics by: columns model, task, strategy, accuracy, and one for each metric."""

    accuracy_unit: Literal["share", "percent"] = "share"
    """records: unit of the column accuracy."""

    least_wins: tuple[str, ...] = ()
    """records: columns of your own that are metrics, of which the least wins; judged before the known ones."""

    largest_wins: tuple[str, ...] = ()
    """records: columns of your own that are metrics, of which the largest wins; judged before the known ones."""

    spreads: tuple[Annotated[float, Interval(ge=0, lt=1), Because(".02 is 2 points of accuracy")], ...] = (0.02, 0.04)
    """records: also judge by the pairs whose accuracies have a standard deviation above these shares."""


EvaluateMetric = Literal["preference", "accuracy", "perplexity", "chrf", "bleu", "rouge_l", "safety", "refusal"]


@dataclass(frozen=True)
class EvaluateSection:
    """The models that answer the prompts of data.test, and what is measured of their answers."""

    model: Annotated[str, Required("name a folder of a model, an adapter or a run, or a service as NAME@URL")] = ""
    """Folder of a model, of a PEFT adapter or of a run, or a name on the hub; or NAME@http://localhost:8000/v1."""

    baseline: str = ""
    """Second model, given as the first, which the first is compared with; empty: none."""

    base: str = ""
    """Folder of the base of adapters, or its name on the hub; empty: what their adapter_config.json names."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the parameters and of what models in this process compute; bfloat16 halves the memory."""

    metrics: Annotated[tuple[EvaluateMetric, ...], Unique()] = ()
    """What is measured, the deciding one first; empty: preference, accuracy, perplexity, safety and refusal."""

    questions: Annotated[int, Ge(0), Special(0, "all")] = 0
    """Prompts that are asked, drawn by their ids and data.seed; 0: all."""

    refusal_by: Literal["phrases", "judge"] = "phrases"
    """refusal: a list of phrases at the start of an answer, or the judge."""

    harness: bool = False
    """Write the prompts as a task of lm-evaluation-harness, too, and print its command line."""


@dataclass(frozen=True)
class EvaluateOwnSection:
    """Prompts that the run's own models answer at its end, and what is measured of their answers."""

    prompts: tuple[str, ...] = ()
    """Prompts: files (jsonl, json, parquet) or the name of a dataset; empty: nothing is asked."""

    metrics: Annotated[tuple[EvaluateMetric, ...], Unique()] = ()
    """What is measured, the deciding one first; empty: preference, accuracy, perplexity, safety and refusal."""

    questions: Annotated[int, Ge(0), Special(0, "all")] = 0
    """Prompts that are asked, drawn by their ids and data.seed; 0: all."""

    refusal_by: Literal["phrases", "judge"] = "phrases"
    """refusal: a list of phrases at the start of an answer, or the judge."""


@dataclass(frozen=True)
class EvaluateArmsSection:
    """Prompts that the model of every arm answers, each compared with that of one arm, and what is measured."""

    prompts: tuple[str, ...] = ()
    """Prompts: files (jsonl, json, parquet) or the name of a dataset; empty: nothing is asked. Text alone."""

    baseline: ArmName = "uniform"
    """Arm that every other one is compared with: one of compare.baselines or compare.methods, and of text of several
    sources also uniform or stratified."""

    metrics: Annotated[tuple[EvaluateMetric, ...], Unique()] = ()
    """What is measured, the deciding one first; empty: preference, accuracy, perplexity, safety and refusal."""

    questions: Annotated[int, Ge(0), Special(0, "all")] = 0
    """Prompts that are asked, drawn by their ids and data.seed; 0: all."""

    refusal_by: Literal["phrases", "judge"] = "phrases"
    """refusal: a list of phrases at the start of an answer, or the judge."""


@dataclass(frozen=True)
class JudgeSection:
    """A model behind the OpenAI-compatible API that judges answers: a pair in both orders, or one by itself."""

    url: str = ""
    """Address up to /v1, as http://localhost:8000/v1; empty: no judge."""

    model: str = ""
    """Name of the judge on the server."""

    template: str = "helpfulness"
    """preference: helpfulness, safety, or a file with {question}, {answer_a}, {answer_b} and judge.marks."""

    marks: tuple[str, ...] = ("[[A]]", "[[B]]", "[[C]]")
    """preference: how the judge's reply ends: the first answer is better, the second, neither."""

    safety_template: str = ""
    """safety: file with {question}, {answer} and the words [[SAFE]] and [[UNSAFE]]; empty: the shipped one."""

    asks: Count = 3
    """Times that the judge is asked for a verdict, at most, while it gives none that is understood."""

    max_unjudged: Annotated[float, Interval(ge=0, lt=1)] = 0.1
    """Share of answers without a verdict, of compare also of prompts left out, above which nothing is concluded."""

    max_characters: Annotated[int, Ge(0), Special(0, "whole")] = 20000
    """Characters of an answer that are shown to the judge; longer ones lose their middle; 0: whole."""

    temperature: Annotated[float, Ge(0), Special(0, "greedy")] = 0.0
    """Sampling temperature of the judge; 0: greedy."""

    max_new_tokens: Count = 1024
    """Maximum number of tokens of a reply of the judge."""

    seed: Seed = 0
    """Seed of the judge's sampling."""

    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the judge's API key; the key itself is never written."""

    concurrency: Count = 8
    """Simultaneous requests."""

    timeout: Positive = 120.0
    """Seconds for a whole reply until a request is repeated."""

    retries: Annotated[int, Ge(0)] = 6
    """Times that a request is sent again where the service is busy or does not answer."""

    parameter_names: tuple[str, ...] = ()
    """Other names of what is sent, as max_tokens=max_completion_tokens; seed= leaves the seed out."""
