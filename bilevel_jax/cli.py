"""The command line: `bilevel-jax VERB CONFIG [options]`, one line each into runs/."""

import sys

USAGE = """usage: bilevel-jax VERB CONFIG [options]

  select CONFIG   learn a weight for every training row from a small trusted validation set, by exact hypergradients;
                  writes the weights, the selected subset, a model and a report

CONFIG is a YAML file (configs/quickstart.yaml needs no data of yours; configs/select.yaml is for your own).
`bilevel-jax select --help` explains every option; any of them may follow CONFIG, as in

  bilevel-jax select configs/select.yaml --model.path FOLDER --data.train rows.jsonl --out out/first
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a verb; 0 when it succeeded, 1 for trouble told in one line, 128 + signal when it was stopped."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    verb, *rest = arguments
    if verb not in VERBS:
        print(f"bilevel-jax: no verb {verb!r}; the verbs are: {', '.join(VERBS)}.", file=sys.stderr)
        return 2
    return VERBS[verb](rest)


def _select(arguments: list[str]) -> int:
    from bilevel_jax.runs import config, session

    given = [] if not arguments or arguments[0].startswith("-") else [arguments[0]]
    try:
        settings = config.load(config.SelectConfig, given[0] if given else None, arguments[len(given) :])
        if settings.model.train_dtype == "float64":
            import jax

            jax.config.update("jax_enable_x64", True)
        from bilevel_jax.runs.select import select

        result = select(settings)
    except session.Interrupted as stop:
        print(f"bilevel-jax: {stop}", file=sys.stderr)
        return 128 + stop.number
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        print(f"bilevel-jax: {error}", file=sys.stderr)
        return 1
    print(result["verdict"]["sentence"])
    print(f"report: {settings.output.folder}/report.html")
    return 0


VERBS = {"select": _select}

if __name__ == "__main__":
    sys.exit(main())
