"""A run's responses: kept as they come, under who wrote them and how, and not written again after a stop."""

import json
import signal
from dataclasses import dataclass

import jax
import pytest

from bilevel_jax.lm.inference.generate import Prompt
from bilevel_jax.lm.models import init_params, make_decoder
from bilevel_jax.runs.config.rules import check_config
from bilevel_jax.runs.config.schema import GenerateSection
from bilevel_jax.runs.infra import distributed
from bilevel_jax.runs.infra.placement import make_mesh
from bilevel_jax.runs.infra.session import Interrupted, open_session
from bilevel_jax.runs.scoring.generation import RESPONSES_FILE, make_generator_factory
from tests.lm.inference.test_openai import Server
from tests.lm.models.test_families import TINY

PROMPTS = [Prompt(f"row {at}", (1, 2 + at), ({"role": "user", "content": str(at)},)) for at in range(6)]
SETTINGS = GenerateSection(max_new_tokens=5, max_batch_tokens=100)  # two rows to a batch


class Words:
    """A tokenizer whose tokens are numbers."""

    eos_token_id = 3

    def decode(self, ids, **options):
        return "".join(f"{token} " for token in ids)


@pytest.fixture(scope="module")
def params():
    return init_params(TINY, jax.random.key(0))


MODEL, MESH = make_decoder(TINY), make_mesh(1)


def opened(folder):
    folder.mkdir(exist_ok=True)
    return open_session(folder, progress=False, save_seconds=600)


def lines(folder):
    return (folder / "checkpoints" / RESPONSES_FILE).read_text().splitlines()


def test_responses_are_kept_as_they_come_and_read_after_a_stop(params, tmp_path):
    with opened(tmp_path / "whole") as work:
        expected = make_generator_factory(SETTINGS, MODEL, Words(), MESH, work)(params)(PROMPTS, (0, 1))
        assert [response.text for response in expected[0]] == [
            Words().decode(response.tokens[: len(response.tokens) - response.ended]) for response in expected[0]
        ]
    assert len(lines(tmp_path / "whole")) == 6
    folder = tmp_path / "stopped"
    with opened(folder) as work:
        work.handle_signal(signal.SIGTERM, None)
        with pytest.raises(Interrupted):
            make_generator_factory(SETTINGS, MODEL, Words(), MESH, work)(params)(PROMPTS, (0, 1))
    assert len(lines(folder)) == 1
    with open(folder / "checkpoints" / RESPONSES_FILE, "a") as file:
        file.write('{"torn by a kill": ["')
    with opened(folder) as work:
        make = make_generator_factory(SETTINGS, MODEL, Words(), MESH, work)
        assert make(params)(PROMPTS, (0, 1)) == expected  # the same bits
        assert lines(folder) == lines(tmp_path / "whole")
        assert make(params)(PROMPTS[::-1], (1, 0)) == [row[::-1] for row in expected[::-1]]
        assert len(lines(folder)) == 6
        other = make(jax.tree.map(lambda leaf: 2 * leaf, params))(PROMPTS[:1], (0, 1))
        assert other[0] != expected[0] and len(lines(folder)) == 7
    keys = {key for line in lines(folder) for key in json.loads(line)} - {"seal"}  # of the journal
    assert len(keys) == 12 + 2


def test_responses_are_read_once_the_first_process_has_stored_them(params, tmp_path, monkeypatch):
    """Or one process would generate what another one reads, and wait for it for ever."""
    with opened(tmp_path / "first") as work:
        expected = make_generator_factory(SETTINGS, MODEL, Words(), MESH, work)(params)(PROMPTS, (0, 1))
    stored = (tmp_path / "first" / "checkpoints" / RESPONSES_FILE).read_text()
    with opened(tmp_path / "run") as work:
        path = tmp_path / "run" / "checkpoints" / RESPONSES_FILE
        monkeypatch.setattr(distributed, "wait_for_all_processes", lambda: path.write_text(stored))
        make = make_generator_factory(SETTINGS, MODEL, Words(), MESH, work)
        path.unlink()  # what follows is written to a new one
        assert make(params)(PROMPTS, (0, 1)) == expected and not path.exists()


def test_a_service_writes_whatever_the_parameters(tmp_path, monkeypatch):
    monkeypatch.delenv("http_proxy", raising=False)
    server = Server()
    settings = GenerateSection("service", url=server.url, model="small", api_key_env="NO_SUCH_VARIABLE")
    for _ in range(2):
        with opened(tmp_path) as work:
            make = make_generator_factory(settings, MODEL, Words(), MESH, work)
            one, two = (make(params)(PROMPTS, (0, 1)) for params in (None, {}))
            assert one == two and all(response.log_probs for row in one for response in row)
    assert len(server.requests) == 12
    server.close()


@dataclass(frozen=True)
class Config:
    generate: GenerateSection


@pytest.mark.parametrize(
    "settings, said",
    [
        (
            GenerateSection("service", model="small"),
            r"generate.url = ''.* must be the address of the server, as http://localhost:8000/v1",
        ),
        (
            GenerateSection("service", url="http://localhost:8000/v1"),
            "generate.model = ''.* name the model on the server",
        ),
        (GenerateSection(top_p=0.0), r"generate.top_p = 0.0.* must be in \(0, 1\]"),
        (GenerateSection(temperature=-1.0), r"generate.temperature = -1.0.* must be 0 \(greedy\) or more"),
    ],
)
def test_settings_are_checked(settings, said):
    with pytest.raises(ValueError, match=said):
        check_config(Config(settings), "the config")
    check_config(Config(GenerateSection()), "the config")
