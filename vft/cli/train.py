"""`vft train`: the command of the recipes, which `torchrun -m vft.recipes TASK` runs too."""

from __future__ import annotations

from collections.abc import Sequence

from vft.recipes import main as recipes


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Command line."""
    recipes.main(None, argv, prog)


if __name__ == "__main__":
    main()
