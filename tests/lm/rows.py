"""Rows written to files, for the tests that read them."""

import json


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def put(folder, text, name="rows.jsonl"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)
