"""`python -m leveret.shared.asyncapi docs/asyncapi.yaml docs/amqp.md` writes what is generated in these files."""

import sys
from pathlib import Path

from leveret.shared.asyncapi.document import yaml_text
from leveret.shared.asyncapi.guide import refreshed


def main(names: list[str]) -> None:
    for path in map(Path, names):
        text = refreshed(path) if path.suffix == ".md" else yaml_text()
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
