"""SPPL, IFD and self-similarity against slow loops over a torch model; which answers are shown, exactly."""

import functools
import math

import jax
import numpy as np
import pytest

from bilevel_jax.core.types import Stream
from bilevel_jax.lm.data.examples import Example, Turn
from bilevel_jax.lm.data.tokens import tokenize
from bilevel_jax.lm.inference import loglik
from bilevel_jax.lm.models import init_params, load_model, make_decoder
from bilevel_jax.runs.infra.placement import make_mesh, place_stream, replicate
from bilevel_jax.scores import selfaligned
from bilevel_jax.scores.ifd import ifd_score
from bilevel_jax.scores.perplexity import perplexity_score
from bilevel_jax.scores.requests import make_tokenized_examples, trim_responses
from bilevel_jax.scores.selfsimilarity import response_similarity
from tests.lm.data.test_tokens import CHATML, bpe
from tests.lm.models.test_families import CONFIGS, SMALL

QUESTIONS = ["Name a pet.", "Which one is it?", "Name a dog, or a cat.", "Which {answer}?", "Is it?"]
OWN = ["A cat.", "The dog is it.", "or {question}", "user", "It is a pet."]
RESPONSES = {"short": "A cat.", "long": "The cat is a pet, or it is a dog.\n\nWhich one?"}


@pytest.fixture(scope="module")
def torch_model(tmp_path_factory):
    """A random Llama of transformers on the test tokenizer, and its folder."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {**SMALL, "vocab_size": len(bpe()), "max_position_embeddings": 512, "initializer_range": 0.3}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, bos_token_id=0)).eval()
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def ours(torch_model):
    """(parameters, answers to requests, a of pairs) of the same model."""
    architecture, params = load_model(torch_model[1])
    model = make_decoder(architecture)
    engine = loglik.make_loglik_scorer(model, bucket_lengths=[256], max_batch_tokens=1024)
    return params, functools.partial(engine.score, params), response_similarity(model, 0, max_batch_tokens=512)


def corpus_of(tokenizer, questions, responses, most=0):
    """Every question with every response, as the command reads them."""
    pairs = [(q, r) for q in questions for r in responses]
    some = [
        Example(f"{i:x}#0", i, (Turn("user", q), Turn("assistant", r)), "", None, "", i)
        for i, (q, r) in enumerate(pairs)
    ]
    corpus, cut = trim_responses(tokenize(some, tokenizer, max_length=10**6)[0], tokenizer.all_special_ids, most)
    return make_tokenized_examples(some, corpus), cut


def nll(model, before, ids):
    """Mean -log p of the ids after what stands before, token by token."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([[*before, *ids]])).logits[0].double()
    total = 0.0
    for t, token in enumerate(ids):
        total -= float(torch.log_softmax(logits[len(before) + t - 1], -1)[token])
    return total / len(ids)


def encoded(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def asked_by_hand(question):
    return f"<|begin|><|head|>user\n{question}<|eot|>\n<|head|>assistant\n"


def test_sppl_is_perplexity_after_own_answers(torch_model, ours):
    """With the text of the prompt, its cycling and the chat template written out here, and no token of an end mark."""
    model, tokenizer = torch_model[0], bpe(CHATML)
    shown = selfaligned.choose_shown_answers(np.ones(5, bool), 2)
    write = selfaligned.prompt_writer()
    own = [selfaligned.append_result(text, "3") for text in OWN]
    prompts = [write(q, [own[at] for at in shown[i]]) for i, q in enumerate(QUESTIONS)]
    rows, cut = corpus_of(tokenizer, prompts, RESPONSES.values())
    plan = selfaligned.sppl_score(rows, rows)
    found = -plan.combine(ours[1](plan.requests)).reshape(5, 2)
    assert cut == 0
    for i in (1, 3, 4):
        answers = [OWN[(i + j) % (5 - 1)] + "\n\nFinal Answer: 3" for j in (1, 2)]
        text = (
            f"{QUESTIONS[i]}\n\nWhen you answer, follow the style of inference of these examples.\n\n"
            f"Inference example:\n{answers[0]}\n\nInference example:\n{answers[1]}\n\n"
            "Now answer the question, in that style of inference."
        )
        before = encoded(tokenizer, asked_by_hand(text))
        for s, response in enumerate(RESPONSES.values()):
            expected = math.exp(nll(model, before, encoded(tokenizer, response)))
            assert found[i, s] == pytest.approx(expected, rel=2e-4)  # float32, e^ℓ of ℓ near 7


def test_ifd_and_perplexity_are_their_loops(torch_model, ours):
    model, tokenizer = torch_model[0], bpe(CHATML)
    rows, _ = corpus_of(tokenizer, QUESTIONS[:2], RESPONSES.values())
    plans = [perplexity_score(rows, rows), ifd_score(0)(rows, rows), ifd_score(None)(rows, rows)]
    ppl, with_bos, without = (plan.combine(ours[1](plan.requests)).reshape(2, 2) for plan in plans)
    for i, question in enumerate(QUESTIONS[:2]):
        for s, response in enumerate(RESPONSES.values()):
            ids = encoded(tokenizer, response)
            given = nll(model, encoded(tokenizer, asked_by_hand(question)), ids)
            assert -ppl[i, s] == pytest.approx(math.exp(given), rel=2e-4)
            assert with_bos[i, s] == pytest.approx(given / nll(model, [0], ids), rel=1e-4)
            assert without[i, s] == pytest.approx(given / nll(model, ids[:1], ids[1:]), rel=1e-4)


def test_similarity_is_the_mean_cosine_of_transformers_hidden_states(torch_model, ours):
    import torch

    model, params, tokenizer = torch_model[0], ours[0], bpe()
    texts = [tuple(encoded(tokenizer, text)) for text in (*OWN, *RESPONSES.values())]
    pairs = [(texts[i], texts[j]) for i, j in ((0, 1), (5, 5), (2, 6), (6, 4))]
    found = ours[2](params, *zip(*pairs, strict=True))
    for value, pair in zip(found, pairs, strict=True):
        with torch.no_grad():
            one, other = (
                [
                    h[0, 1:].double().mean(0)
                    for h in model(torch.tensor([[0, *ids]]), output_hidden_states=True).hidden_states
                ]
                for ids in pair
            )
        assert len(one) == SMALL["num_hidden_layers"] + 1
        cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(one, other, strict=True)]
        assert value == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)
    assert found[1] == pytest.approx(1, abs=1e-12) and max(found[[0, 2, 3]]) < 0.99


def test_similarity_does_not_depend_on_batches_devices_or_padding(eight_devices):
    """GPT-2's positions are learned: a padded place beyond the last has none."""
    config = CONFIGS["gpt2"]
    params = init_params(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    texts = [tuple(rng.integers(0, config.vocab_size, n).tolist()) for n in (3, 7, 64, 40, 1, 9)]
    others = texts[::-1]
    whole = response_similarity(make_decoder(config), None)(params, texts, others)
    assert np.isfinite(whole).all()
    np.testing.assert_allclose(
        response_similarity(make_decoder(config), None, max_batch_tokens=1)(params, texts, others), whole, atol=1e-6
    )
    mesh = make_mesh(8)
    place = lambda batch: place_stream(mesh, Stream(lambda step: batch, 1)).batch(0)  # noqa: E731
    spread = response_similarity(make_decoder(config), None, batch_size_multiple=8, place_batch=place)
    np.testing.assert_allclose(spread(replicate(mesh, params), texts, others), whole, atol=1e-6)
    with pytest.raises(ValueError, match="65 tokens, and the model's context holds 64"):
        response_similarity(make_decoder(config), None)(params, [(1,) * 65], [(1,)])
    with pytest.raises(ValueError, match="a response has no token"):
        response_similarity(make_decoder(config), None)(params, [()], [(1,)])


def test_which_answers_are_shown():
    """All kept: c[(i + j) mod (M - 1)], so the last answer is never shown, and nobody sees their own."""
    for count, k in ((4, 2), (5, 2), (50, 2), (6, 3)):
        expected = [[(i + j) % (count - 1) for j in range(1, k + 1)] for i in range(count)]
        assert selfaligned.choose_shown_answers(np.ones(count, bool), k).tolist() == expected
        assert max(map(max, expected)) == count - 2
        assert all(i not in line and len(set(line)) == k for i, line in enumerate(expected))
    # answers 1 and 4 of six are not kept: c = [0, 2, 3, 5], modulus 3
    kept = np.array([1, 0, 1, 1, 0, 1], bool)
    assert selfaligned.choose_shown_answers(kept, 2).tolist() == [[2, 3], [3, 0], [3, 0], [0, 2], [2, 3], [2, 3]]
    assert selfaligned.choose_shown_answers(kept, 1).tolist() == [[2], [3], [3], [0], [2], [2]]
    for count in (0, 1, 3):
        with pytest.raises(
            ValueError, match=f"{count} of 9 answers of the model can be shown, 2 to a question; .* 4 in all"
        ):
            selfaligned.choose_shown_answers(np.arange(9) < count, 2)


def test_prompt_puts_no_text_into_places_that_text_itself_names():
    assert selfaligned.prompt_writer("{question}|{examples}.", "<{answer}>")("{examples}{", ["{question}", "}"]) == (
        "{examples}{|<{question}><}>."
    )
    assert (
        selfaligned.prompt_writer("a{examples}b{question}c", "{answer}")("{examples}", ["1", "2"]) == "a12b{examples}c"
    )
    for template in ("{question}", "{examples}{question}{question}", "{examples}"):
        with pytest.raises(ValueError, match="must hold {.*} and then {.*}, once each"):
            selfaligned.prompt_writer(template)
    assert selfaligned.append_result("a", None) == selfaligned.append_result("a", "3", "") == "a"


def test_responses_are_cut_by_tokens_and_lose_every_end_mark():
    tokenizer = bpe(CHATML.replace("<|eot|>", "<|end|>"))  # an end mark that is not EOS, behind which EOS is put
    rows, cut = corpus_of(tokenizer, QUESTIONS[:1], RESPONSES.values(), most=4)
    texts = [encoded(tokenizer, text) for text in RESPONSES.values()]
    asked = perplexity_score(rows, rows).requests
    assert [list(request.response) for request in asked] == [ids[:4] for ids in texts]
    assert cut == sum(len(ids) > 4 for ids in texts) >= 1
