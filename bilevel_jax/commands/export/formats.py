"""Input formats of TRL, Axolotl, LLaMA-Factory, MaxText and Tunix, and of OpenAI-like services."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bilevel_jax.lm.data.encode import DEFAULT_TEMPLATE, make_template_renderer
from bilevel_jax.lm.data.examples import Example, example_kind, example_to_row, is_preference_pair
from bilevel_jax.lm.data.turns import Turn, Turns

ExportRow = dict[str, Any]
FILE_SUFFIXES = {"jsonl": ".jsonl", "json": ".json", "parquet": ".parquet", "datasets": ""}
"""How the name of the rows' file ends; `datasets` is a folder."""
DATASETS_BUILDERS = {"jsonl": "json", "json": "json", "parquet": "parquet", "datasets": "arrow"}
"""What `datasets.load_dataset` calls such files."""


class ExportTarget(NamedTuple):
    """What is to be written, and where."""

    layout: str
    """chat, prompt, text or preference: that of all rows."""
    path: Path
    """The file of rows, or the folder of `datasets`."""
    container: str
    template: str
    """data.template: it joins a prompt and its response where no chat template does; empty if none was given."""
    weights: Sequence[float] = ()
    """Of each example, the factor of its loss, for formats that have a place of their own for it; empty: 1."""


class FormattedRows(NamedTuple):
    """Rows as a trainer reads them."""

    rows: list[ExportRow]
    config_file: tuple[str, str] | None
    """(name, text) of a file with the trainer's settings for these rows."""
    instructions: str
    """For people: how the trainer is pointed at the rows. Markdown."""
    has_ids: bool = True
    """Whether the rows may have keys beyond those of the format, as `id`."""


def choose_layout(examples: Sequence[Example], requested: str) -> str:
    """The layout of all rows: `requested`, or with auto the one they came in; a ValueError where it cannot hold one."""
    kinds = [_layout_kind(example) for example in examples]
    layout = requested if requested != "auto" else "chat" if set(kinds) == {"chat", "prompt"} else kinds[0]
    for example, kind in zip(examples, kinds, strict=True):
        if kind != layout and (kind, layout) != ("prompt", "chat"):
            remedy = (
                "Set export.layout to chat"
                if (kind, layout) == ("chat", "prompt")
                else "Set export.layout to auto"
                if len(set(kinds)) == 1
                else "Keep dialogues, plain texts and preference pairs in sets of their own"
            )
            raise ValueError(
                f"{example.where}: a row of the layout '{kind}' cannot be written as '{layout}'. {remedy}."
            )
    return layout


def trl(examples: Sequence[Example], target: ExportTarget) -> FormattedRows:
    """messages; prompt and completion; text; prompt, chosen and rejected.

    Prompts and responses are lists of messages, which the chat template joins. Where data.template says how to join
    them they are strings, which TRL puts side by side.
    """
    has_prompt = target.layout in ("prompt", "preference")
    as_strings = bool(target.template) and has_prompt
    rows = [
        _to_strings(example, target.template) if as_strings else _to_messages(example, target.layout)
        for example in examples
    ]
    rows = [_rename_keys(row, {"response": "completion"}) for row in rows]
    trainer = "DPOTrainer(model, DPOConfig()" if target.layout == "preference" else "SFTTrainer(model, SFTConfig()"
    notes = []
    if target.layout == "chat":
        trainer = "SFTTrainer(model, SFTConfig(assistant_only_loss=True)"
        notes.append("Without `assistant_only_loss=True` TRL learns the questions too.")
    if as_strings:
        notes.append("Prompts and responses are strings, the prompt as data.template writes it.")
    elif has_prompt:
        notes.append(
            "Prompts and responses are messages, so the tokenizer needs a chat template; for one without, export with "
            f"`--data.template`, such as {DEFAULT_TEMPLATE!r}."
        )
    code = f"```python\n{_format_loading_code(target)}\ntrainer = {trainer}, train_dataset=rows)\n```"
    return FormattedRows(rows, None, "\n\n".join([code, *notes]))


def axolotl(examples: Sequence[Example], target: ExportTarget) -> FormattedRows:
    """`chat_template` reads messages, `alpaca` instruction and output, `completion` text; DPO two answers."""
    pairs = target.layout == "preference"
    kinds: dict[str, ExportRow] = {
        "chat": {
            "type": "chat_template",
            "field_messages": "messages",
            "roles_to_train": ["assistant"],
            "train_on_eos": "turn",
        },
        "prompt": {"type": "alpaca"},
        "text": {"type": "completion"},
        "preference": {
            "split": "train",
            "type": "chat_template.default",
            "field_messages": "messages",
            "field_chosen": "chosen",
            "field_rejected": "rejected",
        },
    }
    rows = [
        _to_preference_messages(example, "messages")
        if pairs
        else _to_alpaca(example)
        if target.layout == "prompt"
        else _to_messages(example, target.layout)
        for example in examples
    ]
    file = {} if target.container == "datasets" else {"ds_type": DATASETS_BUILDERS[target.container]}
    settings: ExportRow = {"rl": "dpo"} if pairs else {}
    text = _dump_yaml(settings | {"datasets": [{"path": str(target.path)} | file | kinds[target.layout]]})
    use = f"Put `axolotl.yaml` into your config:\n\n```yaml\n{text}```"
    if target.layout == "prompt":
        use += "\n\n`alpaca` puts words of its own around each prompt; export with export.layout = chat for none."
    return FormattedRows(rows, ("axolotl.yaml", text), use)


def llama_factory(examples: Sequence[Example], target: ExportTarget) -> FormattedRows:
    """The alpaca layout for a prompt and its response (or two, with ranking), sharegpt for dialogues, text alone."""
    pairs = target.layout == "preference"
    dialogue = target.layout == "chat" or (pairs and not all(map(_is_short, examples)))
    if dialogue:
        rows = [
            _to_sharegpt(_to_preference_messages(example, "conversations"))
            if pairs
            else example_to_row(example, "sharegpt")
            for example in examples
        ]
        columns = {"messages": "conversations"}
    elif target.layout == "text":
        rows, columns = [example_to_row(example, "text") for example in examples], {"prompt": "text"}
    else:
        rows, columns = [_to_alpaca(example) for example in examples], {"prompt": "instruction", "query": "input"}
        columns |= {} if pairs else {"response": "output"}
    columns |= {"chosen": "chosen", "rejected": "rejected"} if pairs else {}
    info: ExportRow = {"file_name": target.path.name, "formatting": "sharegpt" if dialogue else "alpaca"}
    info |= {"ranking": True} if pairs else {}
    info |= {"columns": columns}
    if dialogue:
        info |= {
            "tags": {
                "role_tag": "from",
                "content_tag": "value",
                "user_tag": "human",
                "assistant_tag": "gpt",
                "system_tag": "system",
            }
        }
    name = target.path.parent.name
    text = json.dumps({name: info}, indent=2, ensure_ascii=False) + "\n"
    stage = {"text": "pt", "preference": "dpo"}.get(target.layout, "sft")
    settings = _dump_yaml({"stage": stage, "dataset_dir": str(target.path.parent), "dataset": name})
    use = f"`dataset_info.json` describes the rows. In your training config:\n\n```yaml\n{settings}```"
    if skipped := [example for example in examples if not _alternates(example)]:
        use += (
            f"\n\n{len(skipped):,} rows, the first {skipped[0].where}, do not go from user to assistant and back in "
            "turns; LLaMA-Factory warns of such rows and skips them."
        )
    return FormattedRows(rows, ("dataset_info.json", text), use)


def maxtext(examples: Sequence[Example], target: ExportTarget) -> FormattedRows:
    """messages, or lists of them as prompt and completion; text; for DPO strings, since no chat template is applied."""
    if target.layout == "preference":
        rows = [_to_strings(example, target.template or DEFAULT_TEMPLATE) for example in examples]
    else:
        rows = [_rename_keys(_to_messages(example, target.layout), {"response": "completion"}) for example in examples]
    columns = {
        "chat": ["messages"],
        "prompt": ["prompt", "completion"],
        "text": ["text"],
        "preference": ["prompt", "chosen", "rejected"],
    }[target.layout]
    files = target.path / "*.arrow" if target.container == "datasets" else target.path
    settings: ExportRow = {
        "text": {},
        "preference": {"use_dpo": True, "packing": False},
    }.get(target.layout, {"use_sft": True, "sft_train_on_completion_only": True})
    settings = {
        "dataset_type": "hf",
        "hf_path": DATASETS_BUILDERS[target.container],
        "hf_train_files": str(files),
        "train_split": "train",
        "train_data_columns": columns,
    } | settings
    text = _dump_yaml(settings)
    use = f"The keys of MaxText's config, whose SFT and DPO run on Tunix:\n\n```yaml\n{text}```"
    if target.layout == "preference":
        use += (
            "\n\nNo chat template is applied: the prompt stands as data.template writes it. Tunix's own `DPOTrainer` "
            "takes the three columns as `DataInput(prompts, chosen_responses, rejected_responses)`."
        )
    return FormattedRows(rows, ("maxtext.yml", text), use)


def llama_factory_v1(examples: Sequence[Example], target: ExportTarget) -> FormattedRows:
    """messages, or chosen_messages and rejected_messages, in LLaMA-Factory's standard format of its v1.

    `loss_weight` of an answer is the weight of its turn times that of its example. Of a pair no weight is read.
    """
    _refuse_text(target.layout, "LLaMA-Factory v1", "llama_factory")
    pairs = target.layout == "preference"
    weights = target.weights or [1.0] * len(examples)
    rows = [
        {
            "chosen_messages": _to_weighted_parts(example.turns, 1.0),
            "rejected_messages": _to_weighted_parts(_require_one_answer(example).rejected, 1.0),
        }
        if pairs
        else {"messages": _to_weighted_parts(example.turns, weight)}
        for example, weight in zip(examples, weights, strict=True)
    ]
    info = {target.path.parent.name: {"path": str(target.path), "source": "local"}}
    settings = _dump_yaml({"train_dataset": str(target.path.parent / "dataset_info.yaml")})
    use = f"`dataset_info.yaml` describes the rows. In your training config, with `USE_V1=1`:\n\n```yaml\n{settings}```"
    loss = (
        "Its DPO reads no weights."
        if pairs
        else "Each answer is learned as a row of its own, and the loss of a micro-batch is divided by the sum of its "
        "tokens' `loss_weight`, `Σ w n / (Σ w + 1e-6)`: a weight counts against the other rows of its micro-batch "
        "alone, and with `micro_batch_size: 1` it has no effect. Make micro-batches large, or export whole repeats "
        "(`selection.resample`)."
    )
    return FormattedRows(rows, ("dataset_info.yaml", _dump_yaml(info)), f"{use}\n\n{loss}")


def openai(examples: Sequence[Example], target: ExportTarget) -> FormattedRows:
    """messages, or input, preferred_output and non_preferred_output, as OpenAI-like fine-tuning services read them.

    Of a message they read `weight` 0 or 1; that of a row, at its root, is read by some.
    """
    _refuse_text(target.layout, "OpenAI-like services", "trl")
    rows = []
    for example in examples:
        if odd := next((turn for turn in example.turns if turn.weight != 1), None):
            raise ValueError(
                f"{example.where}: an answer has the weight {odd.weight:g}, and OpenAI-like services read 0 or 1 for a "
                "message. Set export.format to llama_factory_v1, or give the row a weight."
            )
        if target.layout == "preference":
            row = _to_preference_messages(example, "messages")
            rows.append(
                {
                    "input": {"messages": row["messages"]},
                    "preferred_output": [row["chosen"]],
                    "non_preferred_output": [row["rejected"]],
                }
            )
        else:
            rows.append(example_to_row(example, "chat"))
    use = (
        f"Upload `{target.path.name}`. Services that read a `weight` at the root of a row, as Fireworks does, multiply "
        "the loss of the row by it. OpenAI documents `weight` for messages alone, 0 or 1: for services that read none "
        "at the root, or refuse keys that they do not know, export with `--export.no-weight-key`, and repeats with "
        "`--selection.resample` in place of weights."
    )
    return FormattedRows(rows, None, use, has_ids=False)


FORMATTERS: dict[str, Callable[[Sequence[Example], ExportTarget], FormattedRows]] = {
    "trl": trl,
    "axolotl": axolotl,
    "llama_factory": llama_factory,
    "llama_factory_v1": llama_factory_v1,
    "maxtext": maxtext,
    "openai": openai,
}
TRAINER_NAMES = {
    "trl": "TRL",
    "axolotl": "Axolotl",
    "llama_factory": "LLaMA-Factory",
    "llama_factory_v1": "LLaMA-Factory v1",
    "maxtext": "MaxText and Tunix",
    "openai": "OpenAI-like services",
}
WEIGHTS_READ = {
    "llama_factory_v1": "`weight` is the factor of the row's loss, and `loss_weight` of its answers holds it.",
    "openai": "`weight` at the root of a row is the factor of its loss, for services that read it there.",
}
"""What the weights of rows are for readers of a format; of others that none reads them is said."""
READS_MESSAGE_WEIGHTS = ("llama_factory_v1", "openai")
"""Formats whose readers know which messages are no targets."""


# ---- rows


def _layout_kind(example: Example) -> str:
    return "preference" if is_preference_pair(example) else example_kind(example)


def _is_short(example: Example) -> bool:
    """Whether both sides of a pair are one question and one answer."""
    sides = (example.turns, example.rejected)
    return {example_kind(example._replace(turns=side)) for side in sides} == {"prompt"}


def _to_messages(example: Example, layout: str) -> ExportRow:
    """Every part as a list of messages; a text stays a text."""
    if layout == "prompt":
        messages = example_to_row(example, "chat")["messages"]
        return {"prompt": messages[:1], "response": messages[1:]}
    return example_to_row(example, "preference_chat" if layout == "preference" else layout)


def _refuse_text(layout: str, readers: str, other: str) -> None:
    if layout == "text":
        raise ValueError(f"{readers} read messages, and the rows are plain text. Set export.format to {other}.")


def _require_one_answer(example: Example) -> Example:
    """The pair, whose sides must end with one answer each behind what they share."""
    _to_preference_messages(example, "messages")
    return example


def _to_weighted_parts(turns: Turns, weight: float) -> list[ExportRow]:
    """Messages with content in parts, and `loss_weight`: `weight` times that of the turn, 0 of what is not learned."""

    def to_message(turn: Turn) -> ExportRow:
        reasoning = [{"type": "reasoning", "value": turn.reasoning}] if turn.reasoning else []
        is_learned = turn.role == "assistant" and turn.is_target
        return {
            "role": turn.role,
            "content": [*reasoning, {"type": "text", "value": turn.content}],
            "loss_weight": float(turn.weight * weight) if is_learned else 0.0,
        }

    return [to_message(turn) for turn in turns]


def _to_strings(example: Example, template: str) -> ExportRow:
    """Every part as a string: the prompt as the template writes it, up to the response."""
    if is_preference_pair(example) and not _is_short(example):
        raise ValueError(
            f"{example.where}: a dialogue of several messages, and this form joins one prompt and one response by a "
            "template. Set export.format to trl and leave data.template empty."
        )
    row = example_to_row(example, _layout_kind(example))
    text, (start, _) = make_template_renderer(template)(example._replace(rejected=()))
    return row | {"prompt": text[:start]}


def _to_alpaca(example: Example) -> ExportRow:
    """The alpaca layout; of a pair, with chosen and rejected in place of output."""
    if not is_preference_pair(example):
        return example_to_row(example, "alpaca")
    return _rename_keys(example_to_row(example, "preference"), {"prompt": "instruction"}) | {"input": ""}


def _to_preference_messages(example: Example, name: str) -> ExportRow:
    """The messages of the prompt under `name`, and one message each for the two answers."""
    row = example_to_row(example, "preference_chat")
    for side in ("chosen", "rejected"):
        if len(row[side]) != 1:
            raise ValueError(
                f"{example.where}: the {side} side goes on for {len(row[side])} messages behind the prompt, and this "
                "form holds one. Set export.format to trl, or leave the row out."
            )
    return {name: row["prompt"], "chosen": row["chosen"][0], "rejected": row["rejected"][0]}


def _to_sharegpt(row: ExportRow) -> ExportRow:
    """The same in the words of ShareGPT."""
    names = {"system": "system", "user": "human", "assistant": "gpt"}

    def convert_message(message: ExportRow) -> ExportRow:
        others = {key: value for key, value in message.items() if key not in ("role", "content")}
        return {"from": names[message["role"]], "value": message["content"]} | others

    return {
        key: [convert_message(message) for message in value] if isinstance(value, list) else convert_message(value)
        for key, value in row.items()
    }


def _alternates(example: Example) -> bool:
    """Whether the turns behind a system message go user, assistant, user, assistant ...; texts have none."""
    roles = [turn.role for turn in example.turns if turn.role != "system"]
    return roles in (["text"], ["user", "assistant"] * (len(roles) // 2))


def _rename_keys(row: ExportRow, names: dict[str, str]) -> ExportRow:
    return {names.get(key, key): value for key, value in row.items()}


def _dump_yaml(settings: ExportRow) -> str:
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def _format_loading_code(target: ExportTarget) -> str:
    if target.container == "datasets":
        return f"from datasets import load_from_disk\n\nrows = load_from_disk({json.dumps(str(target.path))})"
    builder = DATASETS_BUILDERS[target.container]
    files = f"data_files={json.dumps(str(target.path))}"
    return f'from datasets import load_dataset\n\nrows = load_dataset("{builder}", {files}, split="train")'
