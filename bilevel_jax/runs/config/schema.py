"""The sections of all configs: frozen dataclasses, one key a line, with its default and what it means."""

from dataclasses import dataclass
from typing import Literal, get_args

ExampleFormat = Literal[
    "auto", "text", "chat", "sharegpt", "prompt", "completion", "alpaca",
    "preference", "implicit_preference", "alpaca_preference", "sharegpt_preference", "hh",
]  # fmt: skip
ScoreName = Literal["", "ica", "perplexity", "loss", "reducible", "oneshot", "alignment", "margin", "random"]
OuterMethod = Literal["unrolled", "implicit", "window", "alignment", "penalty", "bmo", "mixing"]
SINGLE_LOOP_METHODS = ("penalty", "bmo", "mixing")
LossReduction = Literal["example_mean", "token_sum", "token_mean"]
Remat = Literal["full", "selective", "none"]


@dataclass(frozen=True)
class ModelSection:
    """The language model and which of its parameters are trained."""

    name_or_path: str = ""  # folder of a Hugging Face checkpoint; builtin:cipher or builtin:sums: made on the spot
    from_scratch: bool = False  # train from random parameters, drawn anew for each seed, instead of the checkpoint's
    base_dtype: Literal["float32", "bfloat16"] = "float32"  # how a frozen base is stored; it is upcast layer by layer
    param_dtype: Literal["float32", "float64"] = "float32"  # trained parameters, optimiser state and hypergradients
    remat: Remat = "selective"  # what backward passes compute again: layers (full), cheap parts of them, nothing


@dataclass(frozen=True)
class LoraSection:
    """Low-rank adaptation (LoRA): small factors are trained beside a frozen base model."""

    r: int = 16  # rank of the LoRA factors; 0 trains all parameters
    alpha: float = 16.0  # LoRA scale: the factors' product counts alpha/rank times
    target_modules: tuple[str, ...] = ()  # projections that get LoRA factors; empty: those usual for the model family


@dataclass(frozen=True)
class DataSection:
    """The rows to be judged, the trusted validation examples, and how text is read from them."""

    train: tuple[str, ...] = ()  # files (jsonl, json, parquet) or a dataset name: the rows that get weights
    validation: tuple[str, ...] = ()  # validation examples; split by id into validation, dev and test
    dev: tuple[str, ...] = ()  # own rows for dev (early stopping); empty: a share of validation
    test: tuple[str, ...] = ()  # own rows for test (headline numbers); empty: a share of validation
    split: tuple[float, float, float] = (0.5, 0.25, 0.25)  # shares of validation for validation, dev, test
    format: ExampleFormat = "auto"  # shape of a row; auto looks at its keys
    prompt_field: str = "prompt"  # key of the question in a row
    response_field: str = "response"  # key of the answer; its tokens carry the loss
    text_field: str = "text"  # key of plain text; all its tokens carry the loss
    messages_field: str = "messages"  # key of a dialogue
    system_field: str = "system"  # key of a system prompt beside the row's own layout
    chosen_field: str = "chosen"  # key of the preferred response of a pair
    rejected_field: str = "rejected"  # key of the other response
    source_field: str = "source"  # key of where a row comes from: used by weighting per_source and in the report
    label_field: str = ""  # key of a known quality: adds AUC and the oracle's row to the report; never seen in training
    good_label: str = "clean"  # the label of good rows
    empty: Literal["error", "drop"] = "error"  # rows with an empty part: name them and stop, or leave them out
    template: str = ""  # where the tokenizer has no chat template: {prompt} and {response} with what joins them
    max_length: int = 1024  # tokens of an example
    truncation: Literal["error", "right", "left", "drop"] = "error"  # longer ones: stop and name them, cut, leave out
    train_on: Literal["all_turns", "last_turn"] = "all_turns"  # targets: every assistant turn, or the last alone
    packing: bool = False  # several examples in one sequence: faster, same numbers
    streaming: bool = False  # train: read the training examples as training goes, for data too large to hold
    shuffle_buffer: int = 10000  # streaming: rows held back to be shuffled; 0 keeps the order of the files
    leaks: Literal["error", "drop"] = "error"  # what to do with training examples that also stand in validation
    seed: int = 0  # of the split and of the data's order


@dataclass(frozen=True)
class VerifierSection:
    """How a generated response is judged by a rule, where one is known."""

    name: str = ""  # numeric, exact, or path/to/file.py:function of (question, answer, response); empty: not judged
    answer_field: str = ""  # key of the right answer in a row; empty: the row's own response
    markers: tuple[str, ...] = ("####", "Final Answer:")  # numeric: what the answer stands behind; else the last number


@dataclass(frozen=True)
class ObjectiveSection:
    """The loss of one example."""

    name: Literal["sft", "dpo", "simpo"] = "sft"  # sft: of a response; dpo and simpo: of a pair, chosen and rejected
    reduction: LossReduction = "example_mean"  # sft: nats per token of each row, per row, or per token of a step
    beta: float = 0.0  # dpo, simpo: how sharply a margin is judged; 0: the usual 0.1 of dpo, 2.5 of simpo
    gamma_ratio: float = 0.55  # simpo: the margin that is asked for, nats per token (gamma / beta)
    label_smoothing: float = 0.0  # dpo: the share of pairs whose order is taken to be wrong, below 0.5
    reference: str = ""  # dpo: reference.parquet of another run; empty: made at the start, by the model itself


@dataclass(frozen=True)
class OptimizerSection:
    """How parameters are trained, and what the hypergradient differentiates."""

    name: Literal["sgd", "momentum", "adam", "adamw", "lion"] = "adamw"  # lion's derivative is 0: not for unrolled
    learning_rate: float = 1e-4  # peak; too high a rate makes exact hypergradients useless (certify measures it)
    schedule: Literal["constant", "cosine", "linear"] = "cosine"  # after warmup; cosine and linear end at 0
    warmup_steps: int = 10  # steps over which the rate rises to learning_rate
    warmup_ratio: float = 0.0  # the same as a share of all steps; above 0 it takes the place of warmup_steps
    weight_decay: float = 0.0  # pull to 0, decoupled (adamw, lion) or added to the gradient (the others)
    momentum: float = 0.9  # of name=momentum
    b1: float = 0.9  # decay of the gradient's mean
    b2: float = 0.999  # decay of the squared gradient's mean
    eps: float = 1e-8  # added outside the square root
    eps_root: float = 1e-12  # added inside the square root; 0 makes the derivative NaN where a gradient is 0
    max_grad_norm: float = 0.0  # greatest norm of the gradient; 0 does not clip


@dataclass(frozen=True)
class TrainSection:
    """One training run; the outer loop repeats it."""

    max_steps: int = 300  # optimiser steps of one run
    global_batch_size: int = 16  # examples in one step, over all devices
    gradient_accumulation_steps: int = 1  # pieces that a step is cut into: less memory, same numbers
    seed: int = 0  # of the start of the parameters


@dataclass(frozen=True)
class FineTuneSection:
    """One training run with given weights."""

    num_epochs: float = 1.0  # passes over the training examples
    max_steps: int = 0  # optimiser steps; 0: as many as train.num_epochs asks for
    global_batch_size: int = 16  # examples in one step, over all devices
    gradient_accumulation_steps: int = 1  # pieces that a step is cut into: less memory, same numbers
    seed: int = 0  # of the start of the parameters
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # factors of the matrix products; sums stay in float32
    eval_steps: int = 50  # steps between two readings of the validation loss; it is read at both ends too
    load_best: bool = False  # write the parameters of the step that is best on dev, instead of the last
    max_nonfinite_steps: int = (
        0  # steps that may be left out because their gradient is not finite; one more stops the run
    )


@dataclass(frozen=True)
class WeightsSection:
    """Where the weights of the training examples come from."""

    score: ScoreName = ""  # made of the rows as the model trains, instead of a file; see section scores
    refresh: int = 1  # score: how often it is made, at equal spacing over the run; 1: once, at the start
    scaling: Literal["batch", "rows", "quantiles"] = "batch"  # score -> 0 to 1 by min-max over each step's rows, or all
    quantile: float = 0.05  # scale=quantiles: share of rows at each end that is cut to weight 0 or 1, then min-max
    file: str = ""  # weights.parquet of `select`, or parquet, jsonl, json with an id; empty: the constant
    column: str = "weight"  # its column: a weight, or a score (larger is better)
    constant: float = 1.0  # the weight of every row where no file is given
    transform: Literal["none", "negate", "minmax", "rank"] = "none"  # score -> weight: -s; (s - min)/(max - min); rank
    mean_one: bool = False  # divide by the mean, so that the learning rate keeps its meaning
    missing: Literal["error", "one", "zero", "drop"] = "error"  # rows whose id the file lacks


@dataclass(frozen=True)
class ScoresSection:
    """How scores of training examples are made, from the model and validation; larger is better."""

    k: int = 3  # ica: rows of validation that are shown before each row
    demonstrations: str = "knn"  # ica: which: knn (nearest), clustered:K (of the row's cluster), fixed or random
    embedding: Literal["tfidf", "hidden"] = "tfidf"  # ica: what near means: words, or the model's mean hidden states
    per_token: bool = True  # ica, oneshot: mean over a response's tokens, as losses are; false: their sum
    max_similarity: float = 0.95  # ica, oneshot: questions of this cosine or more are never shown to each other
    template: str = ""  # ica, oneshot: {demonstrations} and {row} with what stands around them
    demonstration_template: str = ""  # ica, oneshot: {demonstration} with what stands around each
    anchors: int = 32  # oneshot: rows of validation that judge, drawn once; each row is shown to every one of them
    seed: int = 0  # of what a score draws: demonstrations, anchors, the holdout model's start, random
    holdout_steps: int = (
        0  # reducible: steps of the holdout model on validation; 0: as many as the run, which is the most
    )


@dataclass(frozen=True)
class GenerateSection:
    """How responses are written: by the model itself, or by a service with the OpenAI-compatible HTTP API."""

    backend: Literal["embedded", "service"] = "embedded"  # the model itself, in this process; or generate.url
    num_generations: int = 1  # responses to each prompt
    temperature: float = 1.0  # divides the logits; 0: greedy
    top_k: int = 0  # only the k most probable tokens; 0: all
    top_p: float = 1.0  # only the most probable tokens that together reach this probability; 1: all
    max_new_tokens: int = 256  # tokens of a response, its end token included
    seed: int = 0  # of what is drawn
    max_batch_tokens: int = 8192  # embedded: token places of a batch, prompts and responses: this bounds the memory
    url: str = ""  # service: its address up to /v1, as http://localhost:8000/v1
    model: str = ""  # service: the name of the model there
    api_key_env: str = "OPENAI_API_KEY"  # service: the environment variable with its key, which is written nowhere
    concurrency: int = 8  # service: requests at the same time
    timeout: float = 120.0  # service: seconds without a sign of it until a request is sent again


RefineMethod = Literal["unrolled", "penalty", "bmo", "mixing", "uniform"]


@dataclass(frozen=True)
class RefineSection:
    """Rounds: the model answers some questions anew, candidates are trained on that, the best replaces it or not."""

    rounds: int = 3  # each generates, trains every candidate and tests the best of them
    questions: Literal["fixed", "dynamic", "all", "none"] = "fixed"  # answered anew: drawn once, least weight now, ...
    share: float = 0.1  # fixed, dynamic: share of the questions that are answered in a round
    methods: tuple[RefineMethod, ...] = ("penalty",)  # a candidate each: how rows are weighted; uniform: not at all
    keep_offline: bool = (
        False  # keep the offline examples of these questions beside the responses, or let responses replace them
    )
    ratio: Literal["token", "sequence", "none"] = "token"  # responses' losses by importance ratio; bmo: its own weights
    max_ratio: float = 10.0  # the largest ratio
    start_from: Literal["accepted", "first"] = "accepted"  # the model that candidates are trained from
    verifier_use: Literal["report", "filter"] = (
        "report"  # what section check is for: told alone, or wrong responses are out
    )
    level: float = 0.05  # of the test of a candidate: one-sided, on dev, by paired bootstrap
    bonferroni: bool = (
        True  # divide it by the number of looks, rounds times methods, so that it holds for the whole run
    )


@dataclass(frozen=True)
class OuterSection:
    """How the weights are learned."""

    method: OuterMethod = "unrolled"  # unrolled: exact for the run itself; penalty, bmo and mixing: see single
    weighting: Literal["softmax", "sigmoid", "per_source", "by_features"] = "softmax"  # what is learned -> weights
    steps: int = 8  # steps of the weights: each trains once and sweeps once
    learning_rate: float = 0.7  # of the weights' logits, along the hypergradient divided by its rms; at the start
    schedule: Literal["constant", "cosine", "linear"] = "constant"  # cosine and linear end at 0: the weights settle
    max_step: float = 2.0  # greatest change of one logit in one step
    restart: Literal["cold", "warm"] = "cold"  # train from the first parameters again, or from the last
    reshuffle: bool = True  # new data order at each restart, or the weights over-fit one order
    ess_floor: float = 0.1  # stop when the effective sample size falls below this share of the rows
    patience: int = 3  # stop after so many steps without a better loss on dev; 0 never stops
    window: int = 20  # method=window: how many last steps are swept
    memory_gib: float = 0.0  # unrolled, window: what kept states of training may take on a device; 0: half of the rest
    offload: Literal["device", "host", "disk"] = "device"  # where those between the steps at hand are kept
    linearize: bool = False  # unrolled, window: a quarter less work to step back, for the activations of kept steps
    proximal: float = 0.0  # delta in the training loss's prior delta/2 |params - start|^2; method=implicit needs it
    curvature: Literal["gauss_newton", "hessian"] = "gauss_newton"  # implicit: the matrix of the solve
    solver: Literal["cg", "neumann", "dense", "identity"] = "cg"  # implicit: how it is solved
    neumann_rate: float = 0.1  # solver=neumann: step size, below 2 over the largest curvature
    tolerance: float = 1e-4  # implicit: relative residual at which the solve stops
    max_iterations: int = 100  # implicit: products at which it gives up
    curvature_batches: int = 8  # implicit: batches in the matrix; doubled until the solution stays
    warm_start: ScoreName = ""  # the logits from which the first step goes: standardised scores; empty: equal weights


@dataclass(frozen=True)
class SingleLoopSection:
    """Methods whose weights move with the parameters, in one run that trains on V as well: penalty, bmo, mixing."""

    steps: int = 0  # steps of that run; 0: as many as outer.steps trainings have
    validation_shares: tuple[float, ...] = (
        0.5,
        0.4,
        0.3,
    )  # share of L_v in the loss, for equal parts of the run (mixing: rho)
    second_model: Literal["copy", "none"] = (
        "copy"  # penalty: a second model trained on the weighted rows alone, or none
    )
    temperatures: tuple[float, float] = (1.0, 0.1)  # bmo: tau at the first and the last step, geometric between
    reference: Literal["none", "snapshot", "copy"] = "none"  # bmo: what losses are compared with (phi)
    inner_steps: int = 1  # bmo with a copy: its steps for each step
    proximal: float = 1.0  # bmo with a copy: strength of its pull to the parameters (l)
    eval_steps: int = 50  # steps between two readings of L_v


@dataclass(frozen=True)
class OutputSection:
    """What is written, and where."""

    dir: str = "out"  # the run's folder; never overwritten
    resume: bool = False  # go on with the run in that folder
    progress: bool = True  # show a progress bar
    save_minutes: float = 10.0  # save in the middle of an outer step when the last save is older


@dataclass(frozen=True)
class TrainOutputSection:
    """What is written, and where."""

    dir: str = "out"  # the run's folder; never overwritten
    resume: bool = False  # go on with the run in that folder
    progress: bool = True  # show a progress bar
    save_minutes: float = 10.0  # save when the last save is older
    model: Literal["full", "adapter", "both"] = "both"  # LoRA: the merged model, the PEFT adapter, or both


@dataclass(frozen=True)
class SelectionSection:
    """Which rows the selected data hold."""

    top_share: float = 0.8  # share of rows, by weight
    threshold: float = 0.0  # instead: rows of at least this weight (the mean weight is 1); 0 = off
    resample: int = 0  # instead: so many rows drawn in proportion to their weight, as whole repeats; 0 = off
    per_source: int = 0  # instead: so many rows, each source in proportion to its total weight, by weight; 0 = off


Variant = Literal[
    "uniform", "learned", "selected", "random", "alignment", "perplexity", "validation", "train+validation", "oracle",
    "ica", "loss", "reducible", "oneshot", "margin",
]  # fmt: skip
DEFAULT_VARIANTS: tuple[Variant, ...] = get_args(Variant)[:9]
"""Without the scores, which are made by the model before training; alignment and perplexity: after uniform training."""


@dataclass(frozen=True)
class RetrainSection:
    """The headline numbers: cold retraining with the final weights, read on test."""

    enabled: bool = True  # costs one training per row and seed
    seeds: int = 3  # trainings per row
    variants: tuple[Variant, ...] = DEFAULT_VARIANTS  # what is compared; the names of scores: the best rows by them


@dataclass(frozen=True)
class CertifySection:
    """Is the hypergradient exact, smooth, predictive? Ends in a verdict."""

    enabled: bool = True  # costs two trainings per step size and one sweep
    step_sizes: tuple[float, ...] = (0.1, 0.03, 0.01, 0.003)  # exact: finite differences along the gradient's sign
    removed: float = 0.2  # metasmoothness: share of the training examples left out
    retrains: int = 0  # predictive: trainings with changed weights; 0 = not measured, else at least 8
    retrain_removed: float = 0.5  # predictive: share of the training examples that each retrain leaves out


@dataclass(frozen=True)
class MeshSection:
    """The devices of the run: a mesh of data x model of them, in one process or in several that work as one."""

    data: int = 0  # copies of the parameters, that is, groups of devices; 0 = as many as all devices make
    fsdp: int = 1  # devices that share one copy: each keeps a part, brought together layer by layer where it is used
    sharding_rules: tuple[str, ...] = ()  # rules before the usual ones, as 'layers/down_proj/kernel = - fsdp -'


@dataclass(frozen=True)
class DistributedSection:
    """Several processes that work as one run, as on several hosts: how they find each other."""

    coordinator_address: str = (
        ""  # several processes: host:port of the first, or auto (TPU pods, SLURM, Open MPI, Kubernetes)
    )
    num_processes: int = 0  # how many processes; 0: the environment (JAX_NUM_PROCESSES) or the cluster says
    process_id: int = -1  # the number of this one, from 0; -1: the environment (JAX_PROCESS_ID) or the cluster says


@dataclass(frozen=True)
class ShowSection:
    """What is printed."""

    examples: int = 3  # rows of each part whose tokens are shown, the first ones; 0: none
    ids: tuple[str, ...] = ()  # rows to show instead, by id, as in weights.parquet
    max_tokens: int = 300  # tokens shown of one row; a longer one loses its middle
    width: int = 0  # characters in a line; 0: those of the terminal


@dataclass(frozen=True)
class EstimateSection:
    """Of which machine the estimate is, and how far it may go to make it."""

    command: Literal["auto", "select", "train", "compare", "audit"] = (
        "auto"  # whose config it is; auto: by its sections
    )
    devices: int = 0  # devices of the run; more than there are: simulated, for compiling alone; 0: those there are
    memory_gib: float = 0.0  # memory of one device; 0: that of this machine's
    train_examples: int = (
        0  # training examples of data.max_length tokens each, in place of data that are not here; 0: read the data
    )
    validation_examples: int = 256  # rows: validation examples beside them
    compile: bool = True  # ask the compiler for workspaces; false: sizes of arrays alone, in seconds
    measure: bool = True  # time a few steps on this machine, with random parameters, where they fit
    tflops: float = 0.0  # hours by a device's peak speed, 1e12 operations a second, instead of timing steps
    mfu: float = 0.35  # tflops: the share of the peak that training reaches
    dir: str = ""  # folder for estimate.json


@dataclass(frozen=True)
class ExportSection:
    """What is written, and where."""

    dir: str = "out/export"  # made anew; never overwritten
    format: Literal["trl", "axolotl", "llama_factory", "maxtext"] = "trl"  # whose input; maxtext is Tunix's, too
    layout: Literal["auto", "chat", "prompt", "text", "preference"] = "auto"  # of the rows; auto: as they came
    container: Literal["jsonl", "json", "parquet", "datasets"] = "jsonl"  # datasets: a folder of `save_to_disk`
    weight_key: bool = True  # a `weight` key in each row, for trainers that read one


@dataclass(frozen=True)
class ArraysSection:
    """A classification task with wrong labels, where data.train is one .npz: x_train, y_train, x_test, y_test."""

    hidden_sizes: tuple[int, ...] = ()  # widths of the hidden layers (ReLU); none: linear softmax regression
    train_examples: int = 5000  # training examples, which get weights; drawn from x_train anew for each seed
    validation_examples: int = 500  # rows of validation, drawn from the rest of x_train
    dev_examples: int = 0  # rows of dev, likewise; 0: the last weights count
    test_examples: int = 0  # rows of test, drawn from x_test; 0: all of them
    label_noise: Literal["forced", "redrawn", "none"] = "forced"  # forced: to a wrong class; redrawn: uniform over all
    noise_share: float = 0.5  # of the training examples whose label is changed


CompareMethod = Literal["unrolled", "window", "implicit", "alignment", "penalty", "penalty_alone", "bmo", "mixing"]
Baseline = Literal[
    "uniform", "validation", "train+validation", "oracle", "oracle+validation", "random", "aligned", "low_loss"
]


@dataclass(frozen=True)
class CompareSection:
    """What is compared, and at what cost."""

    methods: tuple[CompareMethod, ...] = ("unrolled", "window", "implicit", "alignment", "penalty", "mixing")  # rows
    baselines: tuple[Baseline, ...] = get_args(Baseline)  # rows that learn no weights
    budget: int = 2000  # budget of a method for one seed: forward and backward passes over one batch
    seeds: int = 3  # wrong labels, data order and start are drawn anew for each
    top_share: float = 0.5  # share of the rows that random, aligned and low_loss keep


EstimatorName = Literal["unrolled", "implicit", "alignment"]
ScoreCheckpoint = Literal["start", "end"]


@dataclass(frozen=True)
class AuditSection:
    """Which scores are judged, and by which retrains."""

    estimators: tuple[EstimatorName, ...] = get_args(
        EstimatorName
    )  # estimates of dL/dw: of L_v, and of each query its own
    scores: tuple[str, ...] = ()  # cheap scores, as in weights.score; empty: every one that the data allow
    checkpoints: tuple[ScoreCheckpoint, ...] = get_args(
        ScoreCheckpoint
    )  # which models cheap scores read: before training, after it
    queries: int = 8  # rows of validation whose own losses are foretold beside L_v, with entries of their own; 0: none
    vmap_size: int = 16  # queries in one reverse sweep, retrains side by side: more is faster and takes more memory
    removed: tuple[float, ...] = (0.5, 0.05)  # shares of the rows that retrains leave out; the verdict reads the first
    subsets: int = 40  # retrains of each share


RankMetric = Literal["sppl", "perplexity", "ifd", "self_similarity", "mix", "car"]


@dataclass(frozen=True)
class RankSection:
    """Which responses are compared, and how."""

    responses_field: str = "responses"  # table: key of the map {strategy: response}; rows without it: a file for each
    strategies: tuple[str, ...] = ()  # those to compare; empty: all
    id_field: str = ""  # files of strategies: key that joins their rows; empty: the question itself
    reward_field: str = ""  # car: key of a reward for each response; in a table a map {strategy: number}
    metrics: tuple[RankMetric, ...] = ()  # what is computed; empty: all, car where there are rewards
    pick_by: RankMetric = "sppl"  # the metric that picks
    block_size: int = 50  # questions of a block, which are also those that the model's shown answers come from
    num_blocks: int = 3  # disjoint blocks; fewer where the questions do not suffice
    k: int = 2  # sppl: answers of the model's own before each question
    mean: Literal["arithmetic", "geometric", "trimmed"] = "arithmetic"  # sppl, perplexity: over a block
    trim: float = 0.1  # mean=trimmed: share of the questions that is left out at either end
    beta: float = 0.5  # mix: weight of perplexity against 1 - self_similarity; -1: by how much each varies
    own_answers: str = ""  # file of the model's own answers, a question and a response a row; empty: generated
    template: str = ""  # sppl: {question} and {examples} with what stands around them
    example_template: str = ""  # sppl: {answer} with what stands around each
    final_answer: str = (
        "\n\nFinal Answer: "  # sppl: between a shown answer and verifier.answer_field; empty: that is not shown
    )
    max_question_tokens: int = 0  # tokens; longer questions are not drawn, and counted; 0: all are
    max_response_tokens: int = 0  # tokens; longer responses are cut there, and counted; 0: none is
    accuracies: tuple[str, ...] = ()  # known ones, name=number for each strategy or a .json file: correlations
    train_examples: int = (
        0  # train-then-test: responses of each strategy to train on, tested on data.validation; 0: off
    )
    train_seeds: int = 3  # train-then-test: trainings for each strategy
