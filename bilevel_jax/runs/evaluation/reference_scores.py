"""chrF, BLEU and ROUGE-L of answers against references, by sacrebleu and rouge-score."""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class TextScore(NamedTuple):
    """A score of answers against references."""

    score_answer: Callable[[str, str], float]
    """(answer, reference) -> 0 to 100."""
    score_corpus: Callable[[Sequence[str], Sequence[str]], float] | None
    """The score of all answers together, where that is more than their mean."""
    signature: str
    """Version and settings, as papers quote them."""


PACKAGES = {
    "chrf": ("sacrebleu", "sacrebleu"),
    "bleu": ("sacrebleu", "sacrebleu"),
    "rouge_l": ("rouge_score", "rouge-score"),
}
"""Score -> (the module, the package that has it)."""


def is_installed(name: str) -> bool:
    """Whether the package of a score is there."""
    return importlib.util.find_spec(PACKAGES[name][0]) is not None


def make_text_score(name: str) -> TextScore:
    """chrf (of characters), bleu (of words, tokenizer 13a) or rouge_l (F-measure, no stemming).

    Sentences are what is compared between models: of BLEU with effective order, since most answers have no 4-gram in
    common; the score of the corpus, which papers report, is another number. Raises ValueError where the package is not
    installed.
    """
    module, package = PACKAGES[name]
    if not is_installed(name):
        raise ValueError(
            f"evaluate.metrics names {name}, and {package} is not installed: pip install 'bilevel-jax[evaluate]', or "
            "leave it out."
        )
    return _make_rouge(module) if name == "rouge_l" else _make_sacrebleu(name)


def _make_sacrebleu(name: str) -> TextScore:
    metrics: Any = importlib.import_module("sacrebleu.metrics")
    sentence, corpus = (
        (metrics.CHRF(), metrics.CHRF()) if name == "chrf" else (metrics.BLEU(effective_order=True), metrics.BLEU())
    )
    corpus.corpus_score(["a"], [["a"]])  # the signature is complete once there was a reference
    return TextScore(
        lambda answer, reference: float(sentence.sentence_score(answer, [reference]).score),
        lambda answers, references: float(corpus.corpus_score(list(answers), [list(references)]).score),
        f"{name.upper() if name == 'bleu' else 'chrF'}|{corpus.get_signature()}",
    )


def _make_rouge(module: str) -> TextScore:
    from importlib.metadata import version

    scorer = importlib.import_module(f"{module}.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    return TextScore(
        lambda answer, reference: 100 * float(scorer.score(reference, answer)["rougeL"].fmeasure),
        None,
        f"ROUGE-L|F1|stemmer:no|rouge-score:{version('rouge-score')}",
    )
